"""A run trained in mixed precision is evaluated in it as well, and the output says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.evaluate_video import evaluate_videos
from mcibi_fast.inference.predict import predict
from mcibi_fast.models import Segmentor, hub
from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.weights import ModelSpec, pack_weights, read_spec
from mcibi_fast.recipes import MovingScenesData
from mcibi_fast.reports.gathering import gather
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config

pytestmark = pytest.mark.usefixtures("one_process")
LEARNING = ("epochs=5", "evaluate_every=5", "checkpoint_every=0", "optimizer.lr=0.05")
WAYS = {
    "plain": (),
    "averaged": ("ema=0.5",),
    "views": ("inference.scales=[0.75,1]", "inference.flip=true", "inference.softmax=stride"),
}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs in bfloat16; tests only read them."""
    from accelerate.state import AcceleratorState

    @cache
    def make(name: str) -> Path:
        AcceleratorState._reset_state(True)
        out = tmp_path_factory.mktemp("runs") / name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = make_tiny_config(*LEARNING, "mixed_precision=bf16", *WAYS[name])
            train(config, out, progress=False, report=lambda line: None)
        AcceleratorState._reset_state(True)
        return out

    return make


@pytest.fixture
def plain(make_run: Callable[[str], Path]) -> Path:
    return make_run("plain")


@pytest.fixture(
    params=["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("averaged", "views"))]
)
def run(request: pytest.FixtureRequest, make_run: Callable[[str], Path]) -> Path:
    return make_run(request.param)


def trained_scores(run: Path) -> dict[str, Any]:
    return next(e["metrics"] for e in Run(run).history() if "metrics" in e)


def command(tmp_path: Path, run: Path, *more: str) -> dict[str, Any]:
    file = tmp_path / "scores.json"
    line = ["evaluate", str(run), "--cpu", "--quiet", "--workers", "0", "--json", str(file), *more]
    assert cli.main(line) == 0
    return json.loads(file.read_text())


def test_evaluate_scores_what_the_training_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command(tmp_path, run)
    assert trained_scores(run).items() <= found.items()
    assert found["precision"] == "bf16"
    assert "; mixed precision bf16" in capsys.readouterr().out
    changed = command(tmp_path, run, "--precision", "no")
    assert changed["precision"] == "no" and "; full precision" in capsys.readouterr().out
    assert changed["classes"] != found["classes"]


def test_evaluate_in_python(run: Path) -> None:
    config = Run(run).settings()
    model, spec = load_model(run)
    data = config.data.dataset("val")
    assert spec.mixed_precision == model.precision == "bf16"
    own = evaluate(model, data, inference=config.inference)
    assert own.compute().as_dict(spec.classes) == trained_scores(run)
    given = evaluate(model, data, inference=config.inference, precision="bf16")
    full = evaluate(model, data, inference=config.inference, precision="no")
    assert torch.equal(given.matrix, own.matrix) and not torch.equal(full.matrix, own.matrix)
    model.precision = "no"
    assert torch.equal(evaluate(model, data, inference=config.inference).matrix, full.matrix)
    with pytest.raises(ValueError, match=r"^precision: expected 'no', 'bf16' or 'fp16', got 'b'$"):
        evaluate(model, data, precision="b")  # type: ignore[arg-type]


def test_checkpoints_from_before_take_the_precision_of_their_run(
    plain: Path, tmp_path: Path
) -> None:
    run = plain
    model, spec = load_model(run)
    content = pack_weights(model, spec)
    entry = b', \\"mixed_precision\\": \\"bf16\\"'
    assert content.count(entry) == 1
    old = tmp_path / "run"
    old.mkdir()
    (old / "config.json").write_bytes((run / "config.json").read_bytes())
    (old / "model.safetensors").write_bytes(content.replace(entry, b" " * len(entry)))
    assert read_spec(old / "model.safetensors").mixed_precision == "no"
    assert trained_scores(run).items() <= command(tmp_path, old).items()


def test_fp16_on_a_cpu_is_full_precision_and_says_so(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = command(tmp_path, plain, "--precision", "no")
    capsys.readouterr()
    found = command(tmp_path, plain, "--precision", "fp16")
    assert found["mean_iou"] == full["mean_iou"] and found["precision"] == "no"
    assert "; full precision, because fp16 needs a GPU" in capsys.readouterr().out


def test_the_hub_keeps_the_precision(plain: Path, tmp_path: Path) -> None:
    model, spec = load_model(plain)
    hub.save_pretrained(model, spec, tmp_path)
    assert hub.from_pretrained(tmp_path)[0].precision == "bf16"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("mixed_precision") == "bf16"
    plain = ModelSpec(**asdict(spec) | {"mixed_precision": "no"})
    hub.save_pretrained(model, plain, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))  # as older versions wrote it
    assert hub.from_pretrained(tmp_path)[0].precision == "no"


def autocast_labels(model: Segmentor, image: torch.Tensor) -> np.ndarray:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(image[None]).logits
    size = (image.shape[1], image.shape[2])
    return model.head.class_map(logits.float(), size)[0].numpy()


def test_predict(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plain
    model, spec = load_model(run)
    dataset = Run(run).settings().data.dataset("val")
    right, full = [], []
    for i in range(4):
        pixels = np.asarray(dataset.read(i)[0])
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
        image = (image - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[
            :, None, None
        ]
        right.append(autocast_labels(model, image))
        with torch.no_grad():
            full.append(model.head.class_map(model(image[None]).logits, image.shape[1:])[0].numpy())

    def written(folder: Path) -> list[np.ndarray]:
        return [np.asarray(Image.open(folder / "labels" / f"{i}.png")) for i in range(4)]

    line = ["predict", str(run), str(tmp_path / "0.png"), "--cpu", "--quiet", "--no-overlays"]
    assert cli.main([*line, "--out", str(tmp_path / "one")]) == 0
    assert ", mixed precision bf16" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one/labels/0.png")), right[0])
    assert cli.main([*line, "--out", str(tmp_path / "no"), "--precision", "no"]) == 0
    assert ", full precision" in capsys.readouterr().out
    predict(model, spec, tmp_path, tmp_path / "own", overlays=False)
    assert all(map(np.array_equal, written(tmp_path / "own"), right))
    for i in range(4):
        predict(model, spec, tmp_path / f"{i}.png", tmp_path / "f", overlays=False, precision="no")
    assert all(map(np.array_equal, written(tmp_path / "f"), full))
    assert not all(map(np.array_equal, right, full))


@pytest.mark.slow
def test_the_report_and_the_export_say_it(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    page = tmp_path / "report.html"
    assert cli.main(["report", str(plain), "--out", str(page), "--cpu", "--quiet"]) == 0
    assert "Computed in mixed precision bf16, as in the training" in page.read_text()
    assert cli.main(["export", str(plain), str(tmp_path / "m.pt2"), "--size", "32,32"]) == 0
    assert ", full precision, " in capsys.readouterr().out


def test_reports_show_what_was_scored(plain: Path) -> None:
    model, _ = load_model(plain)
    image = Run(plain).settings().data.dataset("val")[0]["image"]
    seen = gather(model, image[None])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seen.output.logits, model(image[None]).logits)
    assert seen.features.dtype == seen.weight_logits[0].dtype == torch.float32


@pytest.mark.parametrize("history", [0, 1])
def test_videos(history: int) -> None:
    data = MovingScenesData(val_count=2, length=3, size=(32, 40)).dataset("val")
    options = {"feats_channels": 8, "transform_channels": 8, "history": history}
    spec = ModelSpec(
        "fcn_mcibipp", "test_resnet", options, list(data.classes), data.palette.tolist(), [0.5] * 3,
        [0.25] * 3, mixed_precision="bf16",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(spec, pretrained=False).train()
        shape = (4, history + 1, 3, 32, 40) if history else (4, 3, 32, 40)
        for _ in range(20):  # batch norms of another statistics would give one class everywhere
            with torch.no_grad():
                model(torch.randn(shape))
        model.head.decoder.classifier.bias.data.zero_()
        model.eval()

    def counts(**options: Any) -> torch.Tensor:
        return evaluate_videos(model, data, windows=(), **options).confusion.matrix

    full, low = counts(), counts(precision="bf16")
    assert not torch.equal(full, low)
    model.precision = "bf16"
    assert torch.equal(counts(), low) and torch.equal(counts(precision="no"), full)
    if history:
        assert torch.equal(evaluate(model, data).matrix, low)
