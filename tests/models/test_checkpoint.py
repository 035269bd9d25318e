"""Weights files: what they say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.weights import ModelSpec, find_weights, pack_weights, read_spec


def make_spec(**changes: object) -> ModelSpec:
    values = {
        "name": "fcn_mcibipp",
        "backbone": "test_resnet",
        "options": {"feats_channels": 8, "transform_channels": 8},
        "classes": ["road", "sky", "tree"],
        "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = make_spec()
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = create_model(spec)
    with torch.no_grad():
        model.memory.memory[1] = torch.tensor([0.25, 2.0])
    file.write_bytes(pack_weights(model, spec))
    return file


def test_round_trip(weights: Path) -> None:
    model, spec = load_model(weights, classes=["x", "y", "z"])
    assert spec == make_spec() == read_spec(weights)
    assert not model.training
    assert model.memory.memory[1].tolist() == [0.25, 2.0]
    stored = safetensors.torch.load_file(weights)
    assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items())


def test_the_model_ignores_the_label_that_its_spec_names() -> None:
    model = create_model(make_spec(ignore_index=7))
    assert model.head.ignore_index == 7 and model.memory.ignore_index == 7


def test_pretrained_weights_are_not_fetched_to_be_replaced(tmp_path: Path) -> None:
    spec = make_spec(options={"feats_channels": 8, "pretrained": "/nowhere/weights.pth"})
    file = tmp_path / "model.safetensors"
    plain = make_spec(options={"feats_channels": 8})
    file.write_bytes(pack_weights(create_model(plain), spec))
    assert load_model(file)[1].options["pretrained"] == "/nowhere/weights.pth"


def test_where_weights_are_found(weights: Path, tmp_path: Path) -> None:
    assert find_weights(weights) == weights
    assert find_weights(weights.parent) == weights
    for name in ("last", "best"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"")
        assert find_weights(tmp_path).parent.name == name
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*nothing does not exist"):
        find_weights(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no checkpoint"):
        find_weights(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a torch file", b"\xff" * 100])
def test_not_ours(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pth is not a checkpoint of mcibi_fast"):
        load_model(file)


def test_safetensors_of_someone_else(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not a checkpoint of mcibi_fast"):
        load_model(file)


def test_cut_short(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is not a checkpoint of mcibi_fast|is damaged"):
        load_model(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "fcn"}, r"it has an unknown 'head.bottleneck.0.weight' \(and \d+ more\)"),
        ({"options": {"feats_channels": 16, "transform_channels": 8}}, "has shape .* the model's"),
        ({"classes": ["a"], "palette": [[0, 0, 0]]}, "has shape .* the model's has"),
    ],
)
def test_another_architecture(tmp_path: Path, changes: dict, message: str) -> None:
    if changes.get("name") == "fcn":
        changes = changes | {"options": {"feats_channels": 8}}
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack_weights(create_model(make_spec()), make_spec(**changes)))
    with pytest.raises(ValueError, match=message):
        load_model(file)


def test_another_number_of_classes(weights: Path) -> None:
    with pytest.raises(ValueError, match="has 3 classes, the data has 2"):
        load_model(weights, classes=["a", "b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"feats_chanels": 8}}, "model.options: .*feats_chanels"),
        ({"name": "fcm"}, "no model 'fcm'; there are .*fcn_mcibipp"),
        ({"backbone": "resnet5"}, "no model 'resnet5'"),
    ],
)
def test_specifications_that_make_no_model(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(make_spec(**changes))


def test_metadata_is_json_beside_the_weights(weights: Path) -> None:
    with safetensors.safe_open(str(weights), framework="pt") as file:
        assert json.loads(file.metadata()["mcibi_fast"])["classes"] == ["road", "sky", "tree"]
