"""Models in folders and on the Hub: what is written, what is refused, what the Hub is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors

from mcibi_fast.models import hub
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec

SPEC = ModelSpec(
    name="fcn_mcibipp",
    backbone="test_resnet",
    options={"feats_channels": 8, "transform_channels": 8},
    classes=["road", "sky", "tree"],
    palette=[[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    mean=[0.1, 0.2, 0.3],
    std=[0.4, 0.5, 0.6],
)


@pytest.fixture(scope="module")
def model():
    model = create_model(SPEC).eval()
    with torch.no_grad():
        model.memory.memory[1] = torch.tensor([0.25, 2.0])
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return hub.save_pretrained(model, SPEC, tmp_path / "a" / "model")


def same(model, other) -> bool:
    own, others = model.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[k], others[k]) for k in own)


@torch.no_grad()
def test_round_trip(model, folder, generator):
    assert {file.name for file in folder.iterdir()} == {
        hub.WEIGHTS, hub.CONFIG, hub.PREPROCESSOR, hub.CARD,
    }  # fmt: skip
    loaded, spec = hub.from_pretrained(folder)
    assert spec == SPEC and not loaded.training and same(model, loaded)
    images = torch.randn(1, 3, 40, 56, generator=generator)
    assert torch.equal(loaded(images).logits, model(images).logits)
    config = json.loads((folder / hub.CONFIG).read_text())
    assert config["classes"] == SPEC.classes and config["library_name"] == "mcibi_fast"
    assert "library_name: mcibi_fast" in (folder / hub.CARD).read_text()


def test_saving_again_keeps_the_card_and_other_files(model, folder):
    (folder / hub.CARD).write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    hub.save_pretrained(model, replace(SPEC, classes=["a", "b", "c"]), folder)
    assert (folder / hub.CARD).read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine too"
    assert hub.from_pretrained(str(folder))[1].classes == ["a", "b", "c"]


def test_saving_draws_no_random_numbers(model, tmp_path):
    before = torch.get_rng_state()
    hub.save_pretrained(model, SPEC, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "fcn", "options": {"feats_channels": 8}},
            r"describes another model \(head\..* is only in the model\)",
        ),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0]] * 2}, r"describes another model .*\(3,"),
        ({"options": {**SPEC.options, "auxiliary_weight": 0.0}}, "auxiliary.* only in the model"),
    ],
)
def test_another_models_specification_is_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        hub.save_pretrained(model, replace(SPEC, **changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folded_models_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="folded models cannot be saved"):
        hub.save_pretrained(model.fold(), SPEC, tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = create_model(SPEC)
    with torch.no_grad():
        model.memory.memory[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"memory.* not finite"):
        hub.save_pretrained(model, SPEC, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_edited_config_is_refused(folder):
    config = json.loads((folder / hub.CONFIG).read_text())
    (folder / hub.CONFIG).write_text(json.dumps({**config, "classes": ["x", "y", "z"]}))
    with pytest.raises(ValueError, match=r"config\.json: 'classes' differs from what"):
        hub.from_pretrained(folder)
    (folder / hub.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        hub.from_pretrained(folder)
    (folder / hub.CONFIG).unlink()
    assert hub.from_pretrained(folder)[1] == SPEC


def test_what_is_no_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        hub.from_pretrained(tmp_path)
    for name in ("/nowhere/at/all", "nowhere", "./nowhere", "~/model", Path("owner/name")):
        with pytest.raises(FileNotFoundError, match="neither an existing folder nor an owner/name"):
            hub.from_pretrained(name)
    with pytest.raises(ValueError, match=r"revision: .* is a local folder"):
        hub.from_pretrained(tmp_path, revision="v1")


def test_download(model, folder, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo, *, allow_patterns, **options):
        asked.update(options, repo=repo)
        copy = tmp_path / "cache"
        copy.mkdir()
        for name in allow_patterns:
            shutil.copy(folder / name, copy / name)
        return str(copy)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded, spec = hub.from_pretrained("owner/name", "v1", token="secret", cache_dir=tmp_path)
    assert asked == {
        "repo": "owner/name",
        "revision": "v1",
        "token": "secret",
        "cache_dir": tmp_path,
    }
    assert spec == SPEC and same(model, loaded)


def http_error(kind: type[errors.HfHubHTTPError], message: str) -> errors.HfHubHTTPError:
    """As the Hub raises it, without the response whose library depends on the Hub's version."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no connection\nand more"), r"\(no connection\).*network"),
        (ConnectionError("unreachable"), r"\(unreachable\).*hf download owner/name"),
        (http_error(errors.RepositoryNotFoundError, "404"), r"\(404\).*private or gated"),
        (http_error(errors.RevisionNotFoundError, "no v9"), r"\(no v9\)\. Check the rep.*revision"),
        (errors.HFValidationError("bad name"), r"\(bad name\)\. Check the repository's name"),
    ],
)
def test_failed_downloads_say_what_to_do(monkeypatch, error, message):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    expected = f"owner/name is not a folder here, and could not be fetched.*{message}"
    with pytest.raises(RuntimeError, match=expected) as raised:
        hub.from_pretrained("owner/name")
    assert "\n" not in str(raised.value)


def test_really_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"owner/name is not a folder here.*Without a network"):
        hub.from_pretrained("owner/name", cache_dir=tmp_path)


class FakeApi:
    """Keeps what is uploaded."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.calls: list[tuple] = []

    def __call__(self, token):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create_repo", repo, private, exist_ok))

    def file_exists(self, repo, name):
        return name in self.files

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        self.calls.append(("upload_folder", repo_id, commit_message))
        for file in Path(folder_path).iterdir():
            if file.name not in (ignore_patterns or ()):
                self.files[file.name] = file.read_bytes()
        return SimpleNamespace(commit_url="https://hub.test/owner/name/commit/1")


@pytest.mark.parametrize("card", [None, b"mine"])
def test_upload(model, tmp_path, monkeypatch, card):
    api = FakeApi({} if card is None else {hub.CARD: card})
    monkeypatch.setattr(hub, "HfApi", api)
    url = hub.push_to_hub(
        model, SPEC, "owner/name", private=True, token="secret", commit_message="First"
    )
    assert url == "https://hub.test/owner/name/commit/1"
    assert api.calls == [
        ("token", "secret"),
        ("create_repo", "owner/name", True, True),
        ("upload_folder", "owner/name", "First"),
    ]
    assert (api.files.pop(hub.CARD) == card) is (card is not None)
    assert api.files.keys() == {hub.WEIGHTS, hub.CONFIG, hub.PREPROCESSOR}
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    loaded, spec = hub.from_pretrained(tmp_path)
    assert spec == SPEC and same(model, loaded)


def test_upload_by_the_method(model, tmp_path, monkeypatch):
    """As its function; the specification is the model's own, with changed names."""
    api = FakeApi({})
    monkeypatch.setattr(hub, "HfApi", api)
    url = model.push_to_hub("owner/name", classes=["a", "b", "c"], commit_message="First")
    assert url == "https://hub.test/owner/name/commit/1"
    assert api.calls[1:] == [
        ("create_repo", "owner/name", None, True),
        ("upload_folder", "owner/name", "First"),
    ]
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    loaded, spec = hub.from_pretrained(tmp_path)
    assert spec == replace(SPEC, classes=["a", "b", "c"]) and same(model, loaded)


def test_failed_uploads_say_what_to_do(model, monkeypatch):
    api = FakeApi({})
    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(api, "create_repo", lambda *_args, **_options: 1 / 0)
    with pytest.raises(RuntimeError, match=r"upload to owner/name \(division by zero\)\. Log in"):
        hub.push_to_hub(model, SPEC, "owner/name")
    with pytest.raises(ValueError, match="repo: expected owner/name, got 'name'"):
        hub.push_to_hub(model, SPEC, "name")
