"""``--protocol``: how models are tested, what a checkpoint brings, and where it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.commands import run_settings
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import FolderData, InferenceConfig

pytestmark = pytest.mark.usefixtures("one_process")
BROUGHT = {"protocol": "released", "flip": True, "window": [30, 80], "softmax": "stride"}
Fails = Callable[..., str]


class Given(NamedTuple):
    """A checkpoint in no run's directory, and a folder of data."""

    checkpoint: Path
    data: Path

    def command(self) -> list[str]:
        return ["evaluate", str(self.checkpoint), "--root", str(self.data)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    base = tmp_path_factory.mktemp("given")
    file, classes = base / "fcn.safetensors", list("abcdef")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        spec = ModelSpec(
            "fcn", "test_resnet", {"feats_channels": 8}, classes,
            [[40 * k, 0, 0] for k in range(6)], [0.5] * 3, [0.25] * 3,
        )  # fmt: skip
        model = create_model(spec).eval()
        model.head.decoder.classifier.weight.data.mul_(100)
        with torch.no_grad():  # otherwise one class wins everywhere
            logits = model(torch.randn(4, 3, 40, 56)).logits
            model.head.decoder.classifier.bias.sub_(logits.mean((0, 2, 3)))
        file.write_bytes(pack_weights(model, spec))
    rng = np.random.default_rng(0)
    for kind, shape in (("images", (41, 57, 3)), ("labels", (41, 57))):
        (base / kind / "val").mkdir(parents=True)
        pixels = rng.integers(0, 256 if kind == "images" else 6, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(base / kind / "val" / "one.png")
    return Given(file, base)


@pytest.fixture
def brings(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes the checkpoint bring settings of its test, as a converted one does."""

    def bring(inference: Any) -> None:
        read = run_settings.read_spec

        def read_spec(file: Path) -> Any:
            return SimpleNamespace(**vars(read(file)) | {"inference": inference})

        monkeypatch.setattr(run_settings, "read_spec", read_spec)

    return bring


def scores(given: Given, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "scores.json"
    command = [*given.command(), "--json", str(out), "--cpu", "--quiet", "--workers", "0"]
    assert cli.main([*command, *arguments]) == 0
    return json.loads(out.read_text())


def expected(given: Given, **inference: Any) -> float:
    model, _ = load_model(given.checkpoint)
    data = FolderData(str(given.data), classes=list("abcdef")).dataset("val")
    return evaluate(model, data, inference=InferenceConfig(**inference)).compute().pixel_accuracy


def test_evaluate(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = scores(given, tmp_path, "--flip")
    assert "whole image with flip, own protocol" in capsys.readouterr().out
    released = scores(given, tmp_path, "--flip", "--protocol", "released")
    printed = capsys.readouterr().out
    assert "whole image with flip, released protocol" in printed and "says" not in printed
    for found, protocol in ((own, "own"), (released, "released")):
        assert found["inference"]["protocol"] == protocol
        assert found["tested_by"] == f"whole image with flip, {protocol} protocol"
        assert found["pixel_accuracy"] == expected(given, flip=True, protocol=protocol)
    assert own["pixel_accuracy"] != released["pixel_accuracy"]


def test_a_checkpoint_brings_its_protocol(
    given: Given,
    tmp_path: Path,
    brings: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    brings(BROUGHT)
    note = "tested by the released protocol, with which the checkpoint's published number"
    found = scores(given, tmp_path)
    assert capsys.readouterr().out.count(note) == 1
    usual = {"flip": True, "window": (30, 80), "softmax": "stride"}
    assert found["inference"] | {"window": (30, 80)} == vars(
        InferenceConfig(**usual, protocol="released")
    ) | {"scales": [1.0]}
    assert found["pixel_accuracy"] == expected(given, **usual, protocol="released")

    changed = scores(given, tmp_path, "--no-flip")  # options come first
    assert changed["inference"]["flip"] is False
    assert changed["inference"]["protocol"] == "released"
    capsys.readouterr()
    own = scores(given, tmp_path, "--protocol", "own", "--window", "none")
    assert note not in capsys.readouterr().out
    assert own["tested_by"] == "whole image with flip, softmax at the stride, own protocol"


def test_a_checkpoint_that_brings_nonsense(
    given: Given, brings: Callable[[Any], None], fails: Fails
) -> None:
    for brought, message in (
        ({"protocol": "their"}, "InferenceConfig.protocol: expected"),
        ({"windows": 3}, "InferenceConfig has no 'windows'"),
        ({"window": [0, 3]}, "inference.window: expected positive sides"),
    ):
        brings(brought)
        assert f"checkpoint: {given.checkpoint}: {message}" in fails(*given.command())


def test_predict(given: Given, tmp_path: Path, brings: Callable[[Any], None]) -> None:
    """A folder of images: as the option says, or the checkpoint."""
    source = given.data / "images" / "val"

    def predicted(*arguments: str) -> Any:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        command = [
            "predict",
            str(given.checkpoint),
            str(source),
            "--cpu",
            "--quiet",
            "--no-overlays",
        ]
        assert cli.main([*command, "--out", str(out), *arguments]) == 0
        return np.array(Image.open(out / "labels" / "one.png"))

    changes = ["--scales", "0.7", "--flip"]
    own, released = predicted(*changes), predicted(*changes, "--protocol", "released")
    assert not np.array_equal(own, released)
    brings({"protocol": "released", "scales": [0.7], "flip": True})
    assert np.array_equal(predicted(), released)
    assert np.array_equal(predicted("--protocol", "own"), own)


@pytest.mark.parametrize(
    ("backbone", "side"),
    [("resnet50c", 512), ('released_resnest {"depth": 101}', 512), ("released_swin {}", 640)],
)
def test_a_converted_swin_is_tested_at_the_size_of_its_family(backbone: str, side: int) -> None:
    """ADE20K's published number of Swin-L is of a short side of 640."""
    data = run_settings.published_data("ade20k", None, backbone)
    assert (data.short_side, data.long_side) == (side, 4 * side)


def test_wrong_names(given: Given, fails: Fails) -> None:
    both = ["--protocol", "own", "--protocol", "released"]
    assert "--protocol: give one of own and released, not both" in fails(*given.command(), *both)
    assert "--protocol: for videos, which the data are not" in fails(
        *given.command(), "--protocol", "strict", "--protocol", "released"
    )
