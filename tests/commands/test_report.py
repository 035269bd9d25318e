"""The page about runs: what is in it, and one clear line for what cannot be drawn."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.models.registry import parse
from mcibi_fast.recipes import (
    AugmentationConfig,
    FolderData,
    ModelConfig,
    MovingScenesData,
    ScenesData,
    TrainConfig,
)
from mcibi_fast.reports.runs import build_report
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import train

SHARED = ["IoU per class", "Predictions", "Features", "Training", "Settings", "Versions"]
OF_MEMORY = ["What the pixels gather", "What the memory holds"]
PICTURES = {"classes", "predictions", "features", "curves"}
PICTURES_OF_MEMORY = {"weights", "class_weights", "memory", "memory_over_time"}
pytestmark = pytest.mark.usefixtures("one_process")


def tiny(data: ScenesData | FolderData, model: str = "fcn") -> TrainConfig:
    options = {"feats_channels": 8} | (
        {"transform_channels": 8} if model.endswith("mcibipp") else {}
    )
    return TrainConfig(
        data=data,
        model=ModelConfig.named(model, "test_resnet", options),
        augmentation=AugmentationConfig(crop_size=(32, 32)),
        epochs=1,
        batch_size=2,
        device="cpu",
        workers=0,
        log_every=1,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FCN and FCN + MCIBI++ on a few scenes; tests only read them."""
    base = tmp_path_factory.mktemp("runs")
    data = ScenesData(train_count=4, val_count=6, size=(32, 40))
    for model in ("fcn", "fcn_mcibipp"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            train(tiny(data, model), base / model, progress=False, report=lambda line: None)
    run = Run(base / "fcn_mcibipp")
    if not any("memory" in entry for entry in run.history()):
        run.record(step=2, epoch=1, memory={"mean": [0.1] * 12, "std": [1.0] * 12})
    return {"fcn": base / "fcn", "fcn_mcibipp": base / "fcn_mcibipp"}


def folder(root: Path, classes: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            label = rng.integers(len(classes), size=(4, 5)).repeat(8, 0).repeat(8, 1)
            pixels = (label[..., None] * 70 + rng.integers(40, size=(32, 40, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label.astype(np.uint8)).save(root / "labels" / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps(classes))
    return root


Fails = Callable[..., str]


@pytest.fixture
def fails(fails: Fails) -> Fails:
    """The same for reports."""
    return lambda *arguments: fails("report", *arguments, "--quiet", "--cpu")


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


@pytest.mark.slow
def test_two_runs_are_compared_in_one_file(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, gallery = tmp_path / "new" / "page.html", tmp_path / "gallery"
    arguments = [str(runs["fcn"]), str(runs["fcn_mcibipp"]), "--images", "2", "--cpu", "--quiet"]
    more = ["--out", str(out), "--gallery", str(gallery)]
    assert cli.main(["report", *arguments, *more]) == 0
    assert f"report: {out}" in capsys.readouterr().out
    page = out.read_text()
    assert sorted(headings(page)) == sorted(SHARED + OF_MEMORY)
    assert "<title>FCN and FCN + MCIBI++ on the built-in scenes</title>" in page
    assert "<td>FCN + MCIBI++</td>" in page
    # The fields that differ are in the open table, all others folded away.
    assert "<td>model.memory</td><td>None</td><td>mcibipp</td>" in page
    assert "Fields common to all" in page and "<td>optimizer.lr</td>" in page
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!data:)", page)
    files = {path.name.removesuffix(".png").removeprefix("gallery_") for path in gallery.iterdir()}
    assert files == PICTURES | PICTURES_OF_MEMORY
    for path in gallery.iterdir():
        picture = Image.open(path)
        assert picture.width > 500
        picture.load()  # whole

    # The scores are those that training recorded.
    (last,) = (e["metrics"] for e in Run(runs["fcn"]).history() if "metrics" in e)
    assert f"<td>FCN</td><td>{100 * last['mean_iou']:.2f}</td>" in page


@pytest.mark.slow
def test_a_run_without_memory_leaves_its_sections_out(runs: dict[str, Path]) -> None:
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    report = build_report([runs["fcn"]], images=1)
    assert headings(report.html()) == SHARED
    assert set(report.pictures) == PICTURES
    # It is the same page every time, and no global generator is drawn from.
    assert build_report([runs["fcn"]], images=1).html() == report.html()
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpys, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.slow
def test_a_run_with_memory_but_no_lines_of_it(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["fcn_mcibipp"], tmp_path / "run", symlinks=True)
    lines = (copy / "history.jsonl").read_text().splitlines(keepends=True)
    (copy / "history.jsonl").write_text("".join(x for x in lines if '"memory"' not in x))
    pictures = set(build_report([copy], images=1).pictures)
    assert pictures == PICTURES | PICTURES_OF_MEMORY - {"memory_over_time"}


@pytest.mark.slow
def test_an_image_and_a_video_model_on_videos(tmp_path: Path) -> None:
    for model in ("upernet_mcibipp", "upernet_video_mcibipp"):
        history = 2 if "video" in model else 0
        data = MovingScenesData(4, 2, size=(32, 40), length=8, history=history)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = tiny(data, model)
            train(config, tmp_path / model, progress=False, report=lambda line: None)
    runs = [tmp_path / "upernet_mcibipp", tmp_path / "upernet_video_mcibipp"]
    report = build_report(runs, images=2)
    page = report.html()
    title = "UPerNet + MCIBI++ and UPerNet + Video-MCIBI++ on the built-in moving scenes"
    assert f"<title>{title}</title>" in page
    assert (
        headings(page)[1] == "Videos, frame by frame" and "16 labelled frames of 2 videos" in page
    )
    assert "in the middle of val_00001. Two thirds" in page
    assert set(report.pictures) == {"video", "video_2"} | PICTURES | PICTURES_OF_MEMORY
    assert Image.open(io.BytesIO(report.pictures["video"])).width > 6 * 200
    # Clips of another length are the same frames.
    assert "differ in their data" not in page
    assert "Videos, frame by frame" in headings(build_report(runs[1:], images=1).html())


@pytest.mark.slow
def test_names_are_escaped_and_small_data_have_no_features(tmp_path: Path) -> None:
    root = folder(tmp_path / "data <i>", ["<script>x</script>", "a & b"])
    with torch.random.fork_rng():
        config = tiny(FolderData(root=str(root)), "fcn")
        train(config, tmp_path / "run", progress=False, report=lambda line: None)
    page = build_report([tmp_path / "run"]).html()
    assert "<script" not in page and "&lt;script&gt;x&lt;/script&gt;" in page
    assert "on data &lt;i&gt;" in page and "a &amp; b" in page
    assert "Too few images for t-SNE" in page

    # The data may have moved since.
    moved = shutil.move(root, tmp_path / "moved")
    assert "Predictions" in headings(build_report([tmp_path / "run"], root=str(moved)).html())


@pytest.mark.slow
def test_two_runs_of_one_model_are_named_by_their_folders(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(runs["fcn"], tmp_path / "other", symlinks=True)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["val_count"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    page = build_report([runs["fcn"], copy], images=1).html()
    assert "<td>FCN (fcn)</td>" in page and "<td>FCN (other)</td>" in page
    assert "differ in their data" in page


def test_models_are_called_by_their_names() -> None:
    assert parse("upernet_mcibipp").title == "UPerNet + MCIBI++"
    assert parse("upernet_video_mcibi").title == "UPerNet + Video-MCIBI"
    assert parse("fcn_mcibi").title == "FCN + MCIBI"
    with pytest.raises(ValueError, match="no model 'of_my_own'"):
        parse("of_my_own")


def test_what_cannot_be_drawn_is_one_line(
    runs: dict[str, Path], tmp_path: Path, fails: Fails
) -> None:
    fcn = runs["fcn"]
    assert "is not the directory of a run" in fails(tmp_path)
    assert "is not the directory of a run" in fails(tmp_path / "nowhere")
    assert "given twice" in fails(fcn, fcn / ".." / "fcn")
    assert "--images: expected at least 1" in fails(fcn, "--images", 0)
    assert "built-in scenes, which read no folder" in fails(fcn, "--root", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(fcn / "config.json", empty)
    assert f"{empty} holds no checkpoint yet" in fails(fcn, empty)


def test_runs_of_other_classes_cannot_be_compared(
    runs: dict[str, Path], tmp_path: Path, fails: Fails
) -> None:
    data = FolderData(root=str(folder(tmp_path / "data", ["a", "b"])))
    with torch.random.fork_rng():
        train(tiny(data), tmp_path / "run", progress=False, report=lambda line: None)
    line = fails(runs["fcn"], tmp_path / "run")
    assert f"{tmp_path / 'run'} has other classes than" in line and "2 against 12" in line


@pytest.mark.slow
def test_training_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "data", ["a", "b"])
    settings = ["model.name=fcn", "model.backbone=test_resnet", "model.options.feats_channels=8"]
    settings += ["epochs=1", "batch_size=2", "device=cpu", "workers=0"]
    settings += ["augmentation.crop_size=[32,32]", "model.options.auxiliary_weight=0"]
    arguments = ["train", "folder", "--root", str(root), "--quiet", "--set", *settings]
    with torch.random.fork_rng():
        assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
        printed = capsys.readouterr()
        assert f"report: {tmp_path / 'run' / 'report.html'}" in printed.out
        assert "<h2>Predictions</h2>" in (tmp_path / "run" / "report.html").read_text()

        def broken(*args: object, **options: object) -> None:
            raise RuntimeError("no ink\nleft")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mcibi_fast.reports.runs.build_report", broken)
            assert cli.main([*arguments, "--out", str(tmp_path / "second")]) == 0
    err = capsys.readouterr().err
    expected = f"warning: {tmp_path / 'second' / 'report.html'} not written: no ink left\n"
    assert err.endswith(expected) and err.count("mcibi-fast:") == 1
    assert Run(tmp_path / "second").checkpoint("last") is not None
    assert not (tmp_path / "second" / "report.html").exists()
