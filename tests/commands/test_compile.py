"""``--compile`` of evaluate, predict and video: the same results, and a line with the time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from mcibi_fast import cli
from mcibi_fast.models import Segmentor, compilation
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights

K = 3
SIZES = ((40, 48), (40, 48), (48, 40), (56, 44), (33, 61))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, own_generator: None) -> Iterator[None]:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # traces, but generates no code
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    classes, palette = ["a", "b", "c"], [[9 * k, 0, 0] for k in range(K)]
    options = {"feats_channels": 8}
    spec = ModelSpec("fcn", "test_resnet", options, classes, palette, [0.5] * 3, [0.2] * 3)
    file = tmp_path / "fcn.safetensors"
    file.write_bytes(pack_weights(create_model(spec), spec))
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images of four sizes with masks."""
    generator = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        for kind, shape, most in (("images", (*size, 3), 256), ("labels", size, K)):
            file = tmp_path / "data" / kind / "val" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, most, shape, dtype=np.uint8)).save(file)
    (tmp_path / "data/classes.json").write_text(json.dumps(["a", "b", "c"]))
    return tmp_path / "data"


def evaluate(checkpoint: Path, root: Path, out: Path, *more: str) -> object:
    file = ["--json", str(out) + ".json"]
    command = ["evaluate", str(checkpoint), "--root", str(root), "--split", "val", "--cpu"]
    assert cli.main([*command, "--workers", "0", *file, *more]) == 0
    scores = json.loads(Path(file[1]).read_text())
    return scores["mean_iou"], scores["pixel_accuracy"]


def predict(checkpoint: Path, root: Path, out: Path, *more: str) -> object:
    command = ["predict", str(checkpoint), str(root / "images"), "--out", str(out), "--cpu"]
    assert cli.main([*command, *more]) == 0
    return maps(out)


def video(checkpoint: Path, root: Path, out: Path, *more: str) -> object:
    pytest.importorskip("cv2", reason="needs opencv")
    frames = root / "frames"
    frames.mkdir(exist_ok=True)
    for i in range(4):
        Image.open(root / "images/val/0.png").rotate(30 * i).save(frames / f"{i}.png")
    assert cli.main(["video", str(checkpoint), str(frames), "--out", str(out), "--cpu", *more]) == 0
    return maps(out)


def maps(out: Path) -> dict[str, bytes]:
    files = sorted((out / "labels").rglob("*.png"))
    return {file.name: np.asarray(Image.open(file)).tobytes() for file in files}


@pytest.mark.slow
def test_the_same_scores(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of four sizes take no more graphs than those of one."""
    expected = evaluate(checkpoint, root, tmp_path / "plain")
    assert "compiled" not in capsys.readouterr().out
    assert evaluate(checkpoint, root, tmp_path / "compiled", "--compile") == expected
    assert len(re.findall(r"(?m)^compiled in [\d.]+ s$", capsys.readouterr().out)) == 1
    # One that tries the compiler, one of the backbone, one of the head.
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize("command", [evaluate, predict, video])
def test_every_command_compiles(
    command: Callable[..., object],
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model that it calls, for images of all sizes."""
    called: list[bool] = []

    def compile_model(model: Segmentor, *, sizes_differ: bool) -> None:
        assert sizes_differ
        for part in (model.backbone, model.head):
            part.register_forward_pre_hook(lambda *_: called.append(True))
        compilation._watch.attach()

    def tell(self: compilation.CompileTime) -> None:
        self._report("compiled in 41 s")

    monkeypatch.setattr(compilation, "compile_model", compile_model)
    monkeypatch.setattr(compilation.CompileTime, "tell", tell)
    command(checkpoint, root, tmp_path / "plain")
    assert not called and "compiled" not in capsys.readouterr().out
    command(checkpoint, root, tmp_path / "out", "--compile")
    assert len(called) >= 8 and capsys.readouterr().out.count("compiled in 41 s\n") == 1


def test_a_machine_without_a_compiler(
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nand more lines")

    monkeypatch.setattr(torch, "compile", refuse)
    compilation._check_compiler.cache_clear()
    images = root / "images"
    line = fails("predict", checkpoint, images, "--out", tmp_path / "out", "--cpu", "--compile")
    assert "torch.compile does not work on this machine (no C++ compiler found)" in line
