"""A run knows its data: it does not go on with others, and scores of permuted classes are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data.packing import pack
from mcibi_fast.recipes import FolderData, ShardsData, TrainConfig
from mcibi_fast.reports.runs import build_report
from mcibi_fast.training.data import open_splits
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config

CLASSES = ["sky", "road", "car"]
pytestmark = pytest.mark.usefixtures("own_generator")


def write_dataset(root: Path, classes: list[str] = CLASSES) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(256, size=(40, 44, 3), dtype=np.uint8)
            label = rng.integers(3, size=(40, 44), dtype=np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(classes))
    return root


def configure(data: FolderData | ShardsData) -> TrainConfig:
    config = make_tiny_config("epochs=1", "checkpoint_every=0")
    config.data = data
    return config


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a run on it; tests change copies of it."""
    base = tmp_path_factory.mktemp("begun")
    data = FolderData(str(write_dataset(base / "data")))
    seed_global_generators(0)
    train(configure(data), base / "run", progress=False, report=lambda line: None)
    return base


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def resume(base: Path, data: FolderData | ShardsData | None = None) -> list[str]:
    """Goes on with the run's data, or others; the lines it reports, scores left out."""
    lines: list[str] = []
    config = configure(data or FolderData(str(base / "data")))
    train(config, base / "run", resume=True, progress=False, report=lines.append)
    return [line for line in lines if "mIoU" not in line]


def swap_classes(data: Path) -> None:
    (data / "classes.txt").write_text("road\nsky\ncar")


def add_class(data: Path) -> None:
    (data / "classes.txt").write_text("sky\nroad\ncar\ndog")


def remove_training_image(data: Path) -> None:
    (data / "images/train/3.png").unlink()
    (data / "labels/train/3.png").unlink()


def rename_training_image(data: Path) -> None:
    for folder in ("images", "labels"):
        (data / folder / "train/3.png").rename(data / folder / "train/33.png")


def move_to_validation(data: Path) -> None:
    for folder in ("images", "labels"):
        (data / folder / "val/1.png").rename(data / folder / "val/8.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_classes, "class 0 'sky', now 'road'"),
        (add_class, "3 classes, now 4"),
        (remove_training_image, "9 training images, now 8"),
        (rename_training_image, "other training images, or the same in another order"),
        (move_to_validation, "other validation images, or the same in another order"),
    ],
)
def test_other_data_are_refused(copied: Path, change: Callable[[Path], None], message: str) -> None:
    change(copied / "data")
    with pytest.raises(ValueError) as refused:
        resume(copied)
    text = str(refused.value)
    assert text.startswith(f"resume: the data of {copied / 'run'} have changed: {message}; bring")
    assert "--root" in text and "--out" in text and "\n" not in text


@pytest.mark.slow
def test_the_dataset_may_move_and_be_packed(copied: Path) -> None:
    moved = copied / "elsewhere"
    shutil.move(copied / "data", moved)
    data = FolderData(str(moved))
    assert resume(copied, data) == []
    for split in ("train", "val"):
        pack(data.dataset(split), copied / "packed", split, progress=False)
    assert resume(copied, ShardsData(str(copied / "packed"))) == []


def test_a_run_that_does_not_say(copied: Path) -> None:
    (copied / "run" / "data.json").unlink()
    (line,) = resume(copied)
    assert line.startswith(f"resume: {copied / 'run'} does not say what data it began with")
    assert Run(copied / "run").data()["train"]["images"] == 9  # from now on it does
    (copied / "run" / "data.json").write_text('{"classes": ["sky"]}')
    with pytest.raises(ValueError, match=r"data\.json: not a description of a run's data"):
        resume(copied)


def test_splits_must_have_the_same_classes(begun: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", ["road", "sky", "car"])
    for split, root in (("train", begun / "data"), ("val", other)):
        pack(FolderData(str(root)).dataset(split), tmp_path / "packed", split, progress=False)
    config = configure(ShardsData(str(tmp_path / "packed")))
    with pytest.raises(ValueError, match="classes of the splits differ: class 0 'sky', in val 'r"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_evaluation_of_permuted_classes_warns(
    copied: Path, capfd: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    command = ["evaluate", str(copied / "run"), "--root", str(copied / "data"), "--cpu", "--quiet"]
    assert cli.main(command) == 0
    assert capfd.readouterr().err == ""
    swap_classes(copied / "data")
    assert cli.main(command) == 0
    warning = "warning: class 'sky' is number 0 of the checkpoint, but 1 of the data: the classes"
    assert warning in capfd.readouterr().err
    add_class(copied / "data")
    assert "has 3 classes, the data has 4" in fails(*command)


def test_an_image_model_of_permuted_classes_warns(begun: Path, tmp_path: Path) -> None:
    data = FolderData(str(write_dataset(tmp_path / "data", ["road", "sky", "car"])))
    more = FolderData(str(write_dataset(tmp_path / "more", ["road", "sky", "car", "tree"])))
    for classes in (data, FolderData(str(begun / "data")), more):
        config = configure(classes)
        config.model.options["pretrained"] = str(begun / "run")
        lines: list[str] = []
        open_splits(config, Run(tmp_path / "run"), resume=False, report=lines.append)
        warned = [line for line in lines if line.startswith("warning: class 'sky' is number 0")]
        assert len(warned) == (classes is data)
        assert all(
            line.endswith("(classifiers, memory) is taken over by number") for line in warned
        )


@pytest.mark.slow
def test_reports_on_other_classes(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    swap_classes(copied / "data")
    config = json.loads((copied / "run" / "config.json").read_text())
    config["data"]["root"] = str(copied / "data")
    (copied / "run" / "config.json").write_text(json.dumps(config))
    assert "Warning: class &#39;sky&#39; is number 0" in build_report([copied / "run"]).html()
    assert "warning: class 'sky' is number 0" in capfd.readouterr().err
    add_class(copied / "data")
    with pytest.raises(ValueError, match="have 4 classes now, the run has 3"):
        build_report([copied / "run"])
