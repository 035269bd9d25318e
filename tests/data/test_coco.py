"""COCO's JSON (with pycocotools; tried: 2.0.11) as masks of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import CocoDataset, DataError
from mcibi_fast.data.coco import coco_splits
from mcibi_fast.data.run_lengths import decode_runs, parse_runs
from mcibi_fast.recipes.registry import configure

codes = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
H, W = 24, 32


def rectangle(top: int, left: int, bottom: int, right: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def area(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = codes.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Runs down the columns, background first."""
    runs, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": [H, W], "counts": runs}


def thing(image: int, category: int, outline: Any, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "segmentation": outline, **more}


def write(root: Path, things: list[dict[str, Any]], split: str = "train2017", **changes: Any):
    """Three images; categories with ids 7 and 3, so that the file's order is not theirs."""
    content = {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in range(3)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{"id": i} | each for i, each in enumerate(things)],
    } | changes
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(255, size=(H, W, 3), dtype=np.uint8)).save(
            root / split / f"{i}.jpg"
        )
    return root


def label(root: Path, index: int = 0, **options: Any) -> np.ndarray:
    return CocoDataset(root, "train2017", **options).read(index)[1]


def test_all_kinds_of_outlines(tmp_path: Path) -> None:
    mask = area(3, 4, 9, 20)
    for outline in (
        [rectangle(3, 4, 9, 20)],
        [rectangle(3, 4, 9, 10), rectangle(3, 10, 9, 20)],  # parts of one object
        compressed(mask),
        uncompressed(mask),
    ):
        write(tmp_path, [thing(10, 7, outline)])
        assert np.array_equal(label(tmp_path), mask * 2), outline
    data = CocoDataset(tmp_path, "train2017")
    assert data.classes == ["background", "cat", "dog"]  # by the categories' ids
    assert data.palette[0].tolist() == [0, 0, 0]
    pixels, found = data.read(0)
    assert pixels.shape == (H, W, 3) and found.dtype == np.uint8
    assert [data.name(i) for i in range(3)] == ["0", "1", "2"]
    sample = data[0]
    assert sample["image"].shape == (3, H, W) and sample["label"].shape == (H, W)


def test_smaller_objects_are_on_top(tmp_path: Path) -> None:
    small, large = [rectangle(5, 5, 10, 10)], [rectangle(0, 0, 20, 30)]
    expected = area(0, 0, 20, 30) * 2
    expected[5:10, 5:10] = 1
    for things in (
        [thing(10, 3, small), thing(10, 7, large)],
        [thing(10, 7, large), thing(10, 3, small)],
        # The area in the file may be anything, such as that of the box.
        [thing(10, 7, large, area=1), thing(10, 3, small, area=900)],
    ):
        write(tmp_path, things)
        assert np.array_equal(label(tmp_path), expected)
    write(tmp_path, [thing(10, 3, small), thing(10, 7, small)])  # equal: the later one
    assert np.array_equal(label(tmp_path), area(5, 5, 10, 10) * 2)


def test_crowds_are_ignored_below_objects(tmp_path: Path) -> None:
    crowd, inside = uncompressed(area(0, 0, 10, 30)), [rectangle(0, 0, 24, 8)]
    write(tmp_path, [thing(10, 3, inside), thing(10, 7, crowd, iscrowd=1)])
    expected = area(0, 0, 10, 30) * 255
    expected[:, :8] = 1
    assert np.array_equal(label(tmp_path), expected)
    as_class = np.where(expected == 255, 2, expected)
    as_class[:, :8] = 1  # smaller: 192 pixels against 300
    assert np.array_equal(label(tmp_path, crowd="class"), as_class)


def test_images_without_annotations_stay(tmp_path: Path) -> None:
    write(tmp_path, [thing(10, 7, [rectangle(0, 0, 5, 5)])])
    assert (label(tmp_path, 1) == 0).all()
    data = CocoDataset(tmp_path, "train2017", background=False)
    assert len(data) == 3 and data.classes == ["cat", "dog"]
    assert np.unique(data.read(0)[1]).tolist() == [1, 255]
    assert (data.read(1)[1] == 255).all()


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((H, W)) < rng.random()).astype(np.uint8)
    code = compressed(mask)["counts"]
    assert parse_runs(code) == uncompressed(mask)["counts"]
    assert np.array_equal(decode_runs(code, (H, W)), mask)


def test_places(tmp_path: Path) -> None:
    write(tmp_path, [])
    found = tmp_path / "annotations/instances_train2017.json"
    content = found.read_text()
    assert coco_splits(tmp_path) == ["train2017"]
    found.unlink()
    (tmp_path / "annotations/train2017.json").write_text(content)
    assert coco_splits(tmp_path) == ["train2017"] and len(CocoDataset(tmp_path, "train2017")) == 3
    (tmp_path / "annotations/train2017.json").unlink()
    (tmp_path / "train2017/_annotations.coco.json").write_text(content)  # Roboflow's
    assert coco_splits(tmp_path) == ["train2017"] and len(CocoDataset(tmp_path, "train2017")) == 3
    (tmp_path / "here").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "here/train2017")
    (tmp_path / "own.train2017.json").write_text(content)
    options = {"annotations": "own.{split}.json", "images": "here/{split}"}
    assert len(CocoDataset(tmp_path, "train2017", **options)) == 3


SQUARE = [rectangle(0, 0, 5, 5)]


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (thing(10, 7, [[1, 2, 3, 4]]), "a polygon needs three points or more"),
        (thing(10, 7, [[1, 2, 3, 4, 5, 6, 7]]), "a polygon needs three points or more"),
        (thing(10, 7, []), "no polygon in its segmentation"),
        (thing(10, 7, [[0, 0, 9, 0, 9, "x"]]), "a coordinate 'x', not a number"),
        (thing(10, 7, [[0, 0, 1e9, 0, 9, 9]]), "a coordinate 1e+09 far outside the image"),
        (thing(10, 7, [[0, 0, float("nan"), 0, 9, 9]]), "a coordinate nan far outside"),
        (thing(10, 7, {"size": [W, H], "counts": [H * W]}), "a run-length code of size [32, 24]"),
        (thing(10, 7, {"size": [H, W]}), "a run-length code without counts"),
        (thing(10, 7, {"size": [H, W], "counts": [5]}), "run lengths that do not fill the image"),
        (thing(10, 7, {"size": [H, W], "counts": [-1, 769]}), "do not fill the image"),
        (thing(10, 7, {"size": [H, W], "counts": ""}), "do not fill the image"),
        (thing(10, 7, {"size": [H, W], "counts": "0d0"}), "do not fill the image"),
        (thing(10, 7, {"size": [H, W], "counts": "ooooo"}), "do not fill the image"),
        (thing(10, 7, {"size": [H, W], "counts": "\x80"}), "run lengths that are none"),
    ],
)
def test_a_bad_outline_names_its_annotation(
    tmp_path: Path, thing: dict[str, Any], message: str
) -> None:
    write(tmp_path, [thing])
    with pytest.raises(DataError) as caught:
        label(tmp_path)
    text = str(caught.value)
    assert text.startswith("annotations/instances_train2017.json: annotation 0 of 0.jpg: ")
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [thing(11, 7, SQUARE), thing(99, 7, SQUARE)]}, "image_id 99 is not"),
        ({"annotations": [thing(11, 5, SQUARE)]}, "category_id 5 is not listed"),
        ({"annotations": [{"id": 4, "image_id": 10, "category_id": 7}]}, "4: has no seg"),
        ({"annotations": {}}, "no list 'annotations' in it"),
        ({"annotations": [3]}, "annotations: 3 is no entry"),
        ({"images": [{"id": 1, "file_name": "0.jpg"}]}, "0.jpg has no height and width"),
        ({"images": [{"id": "1"}]}, "has no id and file_name"),
        ({"images": []}, "lists no images"),
        (
            {"images": [{"id": 1, "file_name": "0.jpg", "height": H, "width": W}] * 2},
            "images: an id is given twice",
        ),
        (
            {"images": [{"id": 1, "file_name": "../../x.jpg", "height": H, "width": W}]},
            "leads out of the dataset's folder",
        ),
        ({"images": [{"id": 1, "file_name": "9.jpg", "height": H, "width": W}]}, "no 9.jpg in it"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "id 1 is given twice"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "'a' is listed twice"),
        ({"categories": [{"id": i, "name": str(i)} for i in range(300)]}, "1 to 255 are possible"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, [], **changes)
    with pytest.raises(DataError) as caught:
        CocoDataset(tmp_path, "train2017")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_bytes_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotations of val2017; looked for annotations/inst"):
        CocoDataset(write(tmp_path, []), "val2017")
    (tmp_path / "train2017/2.jpg").unlink()
    with pytest.raises(DataError, match=r"train2017/2\.jpg: missing, but annotations/inst"):
        CocoDataset(tmp_path, "train2017")
    file = tmp_path / "annotations/instances_train2017.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(DataError, match=r"instances_train2017\.json: not JSON"):
        CocoDataset(tmp_path, "train2017")
    with pytest.raises(DataError, match="no such folder"):
        CocoDataset(tmp_path / "nothing", "train2017")
    with pytest.raises(DataError, match="leads out of the dataset's folder"):
        CocoDataset(tmp_path, "train2017", annotations="../a.json")


def test_an_image_of_another_size(tmp_path: Path) -> None:
    write(tmp_path, [])
    Image.new("RGB", (W, H + 1)).save(tmp_path / "train2017/0.jpg")
    with pytest.raises(DataError, match=r"train2017/0\.jpg"):
        label(tmp_path)


# --- commands -----------------------------------------------------------------------------------

THINGS = [thing(10 + i, 7 - 4 * (i % 2), [rectangle(2, 2, 20, 20)]) for i in range(3)]


def test_data_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "coco", THINGS)
    write(root, THINGS, "val2017")
    out = ["--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main(["data", "check", "coco", str(root), *out]) == 0
    printed = capsys.readouterr().out
    assert "splits   train2017 3, val2017 3" in printed and "no problems" in printed
    assert "1 cat" in printed
    write(root, [*THINGS, thing(12, 7, [[1, 2]])])
    assert cli.main(["data", "check", "coco", str(root), *out]) == 2
    assert "annotation 3 of 2.jpg: a polygon needs" in capsys.readouterr().err
    assert cli.main(["data", "check", "coco", str(root), *out, "--set", "crow=class"]) == 2
    assert "did you mean crowd?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_training_evaluation_and_packing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "coco", THINGS)
    write(root, THINGS, "val2017")
    run = tmp_path / "run"
    settings = (
        "model.backbone=test_resnet", "model.options.feats_channels=8", "data.size=[32,48]",
        "model.options.transform_channels=8", "epochs=1", "batch_size=2", "device=cpu",
        "workers=0", "augmentation.crop_size=[16,16]",
    )  # fmt: skip
    arguments = ["--root", str(root), "--out", str(run), "--quiet", "--set", *settings]
    assert cli.main(["train", "coco", *arguments]) == 0
    for more in ([], ["--root", str(root)], ["--dataset", "coco", "--root", str(root)]):
        capsys.readouterr()
        assert cli.main(["evaluate", str(run), "--cpu", "--quiet", *more]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        # Polygons of two 18x18 dogs and one cat in three images.
        assert next(row for row in rows if row[0] == "dog")[-1] == f"{2 * 324 / 3 / H / W:.2%}"
    assert cli.main(["data", "pack", "coco", str(root), str(tmp_path / "shards"), "--quiet"]) == 0
    assert (tmp_path / "shards/val2017/index.json").is_file()
    assert configure("coco", str(tmp_path / "shards"), []).data.val_split == "val2017"
