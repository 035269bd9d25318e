"""``evaluate`` and ``predict``: a run's own settings, other datasets, servers, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import ADE20K, CIHP, LIP, Cityscapes
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.metrics import SegmentationMetrics
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import InferenceConfig, NamedData
from tests.data import trees

OWN = InferenceConfig((0.75, 1.0), flip=True)
SIZE = (40, 48)
SETTINGS = (
    "model.backbone=test_resnet",
    "model.options.feats_channels=8",
    "model.options.transform_channels=8",
    "epochs=1",
    "batch_size=2",
    "device=cpu",
    "workers=0",
    "augmentation.crop_size=[32,32]",
    "augmentation.size=[40,40]",
    f"data.size={list(SIZE)}",
    "inference.scales=[0.75,1]",
    "inference.flip=true",
)
Fails = Callable[..., str]
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def lip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on LIP, tested at two scales and mirrored; tests only read it."""
    base = tmp_path_factory.mktemp("lip")
    root, out = str(trees.lip(base / "data")), str(base / "run")
    with torch.random.fork_rng(devices=[]):
        assert cli.main(["train", "lip", "--root", root, "--out", out, "--set", *SETTINGS]) == 0
    return base / "run"


def scores(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "scores.json"
    command = ["evaluate", *arguments, "--cpu", "--quiet", "--workers", "0", "--json", str(file)]
    assert cli.main(command) == 0
    return json.loads(file.read_text())


def lone_checkpoint(path: Path, classes: list[str], name: str = "fcn") -> Path:
    """A weights file in no run's directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = ModelSpec(
            name, "test_resnet", {"feats_channels": 8}, classes,
            [[k % 256, k % 7, 0] for k in range(len(classes))], [0.5] * 3, [0.25] * 3,
        )  # fmt: skip
        path.write_bytes(pack_weights(create_model(spec), spec))
    return path


@pytest.mark.slow
def test_a_run_is_evaluated_by_its_own_settings(
    lip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = [json.loads(line) for line in (lip_run / "history.jsonl").open()]
    trained = next(entry["metrics"] for entry in history if "metrics" in entry)
    found = scores(tmp_path, str(lip_run))
    assert trained.items() <= found.items()
    assert "1 images of val; scales 0.75, 1 with flip" in capsys.readouterr().out
    assert found["inference"]["scales"] == [0.75, 1] and found["inference"]["flip"] is True
    assert (found["split"], found["images"]) == ("val", 1)

    changes = ["--scales", "1", "--no-flip", "--window", "24,32", "--stages", "2"]
    changes += ["--softmax", "stride", "--split"]
    changed = scores(tmp_path, str(lip_run), *changes, "train")
    assert changed["inference"] == {
        "scales": [1.0], "flip": False, "window": [24, 32], "stride": None,
        "softmax": "stride", "stages": 2, "protocol": "own", "threshold": None,
    }  # fmt: skip
    model, _ = load_model(lip_run)
    dataset = NamedData("lip", str(lip_run.parent / "data"), size=SIZE).dataset("train")
    inference = InferenceConfig(window=(24, 32), softmax="stride", stages=2)
    expected = evaluate(model, dataset, inference=inference).compute().as_dict(LIP.classes)
    assert expected.items() <= changed.items()


def test_lip_on_cihp_with_and_without_class_10(
    lip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(trees.cihp(tmp_path / "cihp"))
    arguments = ["--dataset", "cihp", "--root", root]
    found = scores(tmp_path, str(lip_run), *arguments, "--without-class", "10")
    printed = capsys.readouterr().out
    assert "jumpsuits / torso skin" in printed and "mIoU (union)" in printed
    assert "without class 10 (jumpsuits / torso skin): mIoU (union)" in printed

    # At the run's test size, by the run's settings.
    model, _ = load_model(lip_run)
    dataset = NamedData("cihp", root, size=SIZE).dataset("val")
    metrics = evaluate(model, dataset, inference=OWN).compute()
    assert found["mean_iou"] == metrics.mean_iou
    others = [iou for k, iou in enumerate(metrics.iou.tolist()) if k != 10 and iou == iou]
    assert found["without_classes"]["mean_iou"] == pytest.approx(sum(others) / len(others))
    assert found["without_classes"]["indices"] == [10]
    assert found["classes"][10]["class"] == "jumpsuits / torso skin"
    assert found["data"]["name"] == "cihp" and found["data"]["size"] == list(SIZE)


def test_left_out_classes_leave_the_means() -> None:
    iou = torch.tensor([0.5, float("nan"), 0.2, 0.0], dtype=torch.float64)
    accuracy = torch.tensor([0.8, float("nan"), 0.4, float("nan")], dtype=torch.float64)
    pixels = torch.tensor([5, 0, 5, 0])
    metrics = SegmentationMetrics(iou, accuracy, pixels, 0.7 / 3, 0.35, 0.6, 0.6).without([0])
    assert (metrics.mean_iou, metrics.mean_iou_present) == pytest.approx((0.1, 0.2))
    assert metrics.mean_class_accuracy == pytest.approx(0.4)
    assert iou[0] == 0.5  # the original keeps it


def test_a_folded_model_scores_the_same(lip_run: Path, tmp_path: Path, fails: Fails) -> None:
    usual, plain, folded = (
        scores(tmp_path, str(lip_run), *extra) for extra in ([], ["--no-fold"], ["--fold"])
    )
    assert (usual["folded"], plain["folded"], folded["folded"]) == (True, False, True)
    assert usual == folded
    assert folded["pixel_accuracy"] == pytest.approx(plain["pixel_accuracy"], abs=0.02)
    lone = lone_checkpoint(tmp_path / "fcn.safetensors", LIP.classes)
    data = ["--root", str(lip_run.parent / "data"), "--dataset", "lip", "--cpu"]
    assert "--fold: needs a model with a memory; fcn has none" in fails(
        "evaluate", str(lone), "--fold", *data
    )


def test_predict_folds_unless_told_not_to(
    lip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_memory = []

    def noted(model: Segmentor, *args: Any, **options: Any) -> torch.Tensor:
        has_memory.append(hasattr(model, "memory"))
        return predict_labels(model, *args, **options)

    monkeypatch.setattr("mcibi_fast.inference.predict.predict_labels", noted)
    command = ["predict", str(lip_run), str(lip_run.parent / "data" / "val_images"), "--cpu"]
    pictures = []
    for name, options in (("usual", []), ("plain", ["--no-fold"]), ("folded", ["--fold"])):
        assert cli.main([*command, "--out", str(tmp_path / name), *options]) == 0
        (label,) = (tmp_path / name / "labels").glob("*.png")
        pictures.append(np.array(Image.open(label)))
    assert has_memory == [False, True, False]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_predict_takes_the_test_size_and_settings_of_the_run(lip_run: Path, tmp_path: Path) -> None:
    dataset = NamedData("lip", str(lip_run.parent / "data"), size=SIZE).dataset("val")
    source = lip_run.parent / "data" / "val_images"
    command = ["predict", str(lip_run), str(source), "--cpu", "--no-overlays", "--out"]
    assert cli.main([*command, str(tmp_path)]) == 0
    label = np.array(Image.open(tmp_path / "labels" / f"{dataset.name(0)}.png"))
    model, _ = load_model(lip_run)
    image = dataset[0]["image"][None]
    assert image.shape[2:] == SIZE
    with torch.no_grad():
        expected = predict_labels(model, image, trees.SIZE, OWN, flip_pairs=LIP.flip_pairs)[0]
        assert np.array_equal(label, expected.numpy())
    assert cli.main([*command, str(tmp_path / "own"), "--own-size", "--submission"]) == 0
    other = np.array(Image.open(tmp_path / "own" / "labels" / f"{dataset.name(0)}.png"))
    assert not np.array_equal(label, other)
    submitted = np.array(Image.open(tmp_path / "own" / "submission" / f"{dataset.name(0)}.png"))
    assert np.array_equal(submitted, other)  # LIP's masks hold the indices


def test_predict_takes_size_and_mirrored_classes_of_a_run_on_shards(
    lip_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("webdataset", reason="needs webdataset to pack shards")
    shards, copy = str(tmp_path / "shards"), tmp_path / "run"
    root = lip_run.parent / "data"
    assert cli.main(["data", "pack", "lip", str(root), shards, "--quiet"]) == 0
    shutil.copytree(lip_run, copy, symlinks=True)
    config = json.loads((copy / "config.json").read_text())
    config["data"] = {"kind": "ShardsData", "root": shards, "size": SIZE}
    (copy / "config.json").write_text(json.dumps(config))
    labels = []
    for run in (lip_run, copy):
        out = tmp_path / f"out{len(labels)}"
        source = str(root / "val_images")
        assert cli.main(["predict", str(run), source, "--cpu", "--out", str(out)]) == 0
        labels.append([np.array(Image.open(path)) for path in sorted((out / "labels").iterdir())])
    assert np.array_equal(*labels)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [(Cityscapes, "berlin_000000_000019_leftImg8bit.png"), (ADE20K, "ADE_test_00000001.jpg")],
)
def test_a_servers_files(
    dataset: type[Cityscapes] | type[ADE20K],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trees.write_image(tmp_path / "test" / "city" / name, size=(32, 40))
    lone = lone_checkpoint(tmp_path / "model.safetensors", dataset.classes)
    command = ["predict", str(lone), str(tmp_path / "test"), "--out", str(tmp_path), "--cpu"]
    assert cli.main([*command, "--submission", dataset.title.lower(), "--own-size"]) == 0
    assert f"1 for {dataset.title}'s server in {tmp_path}/submission" in capsys.readouterr().out
    stem = Path(name).stem
    with Image.open(tmp_path / "submission" / f"{stem}.png") as picture:
        assert picture.mode == "L"
        ids = np.array(picture)
    label = np.array(Image.open(tmp_path / "labels" / "city" / f"{stem}.png"))
    assert ids.shape == (32, 40)
    assert np.array_equal(dataset.label_map[ids], label)


def test_evaluate_refuses(lip_run: Path, tmp_path: Path, fails: Fails) -> None:
    run = ("evaluate", str(lip_run), "--cpu", "--quiet")
    ade = str(trees.ade20k(tmp_path / "ade"))
    for arguments, message in (
        (["--dataset", "chip"], "no dataset 'chip'; there are ade20k, lip"),
        (["--dataset", "cihp"], "--dataset cihp: say where it is with --root DIR"),
        (["--dataset", "ade20k", "--root", ade], "has 20 classes, the data has 150"),
        (["--split", "test"], "LIP: no split 'test'; there is train, val"),
        (["--scales", "0"], "scales: expected positive numbers, got (0.0,)"),
        (["--scales", "1;2"], "--scales 1;2: expected numbers such as 0.5,0.75,1"),
        (["--window", "8,8", "--stride", "9"], "stride: (9, 9) is more than the window (8, 8)"),
        (["--stride", "9"], "inference.stride: needs sliding windows; give inference.window"),
        (["--window", "1,2,3"], "--window 1,2,3: expected H,W such as 512,512"),
        (["--stages", "0"], "inference.stages: expected at least 1, got 0"),
        (["--without-class", "20"], "--without-class 20: classes are 0..19"),
        (["--without-class", "1,1"], "name each class once"),
        (["--without-class", "ten"], "--without-class ten: expected numbers such as 10,12"),
    ):
        assert message in fails(*run, *arguments), arguments
    lone = lone_checkpoint(tmp_path / "fcn.safetensors", LIP.classes)
    data = ["--root", str(lip_run.parent / "data"), "--dataset", "lip", "--cpu"]
    assert "FCNHead has no memory" in fails("evaluate", str(lone), *data, "--stages", "2")


def test_training_refuses_settings_that_no_evaluation_could_follow(
    lip_run: Path, tmp_path: Path, fails: Fails
) -> None:
    command = ["train", "lip", "--root", str(lip_run.parent / "data"), "--out", str(tmp_path)]
    command += ["--set", *(text for text in SETTINGS if "transform_channels" not in text)]
    assert "stride: needs sliding windows" in fails(*command, "inference.stride=[8,8]")
    assert "FCNHead has no memory" in fails(*command, "model.name=fcn", "inference.stages=2")


def test_predict_refuses(lip_run: Path, tmp_path: Path, fails: Fails) -> None:
    source = str(lip_run.parent / "data" / "val_images")
    out = ["--out", str(tmp_path / "out"), "--cpu"]
    lone = str(lone_checkpoint(tmp_path / "fcn.safetensors", CIHP.classes))
    assert "of no published dataset" in fails("predict", lone, source, *out, "--submission")
    message = fails("predict", lone, source, *out, "--submission", "cityscapes")
    assert "submission: Cityscapes has 19 classes, the model has 20" in message
    assert "FCNHead has no memory" in fails("predict", lone, source, *out, "--stages", "2")
    for folder in "ab":
        trees.write_image(tmp_path / "twice" / folder / "0001.png")
    message = fails("predict", lone, str(tmp_path / "twice"), *out, "--submission", "cihp")
    assert "2 images are called 0001" in message
    assert not (tmp_path / "out").exists()
