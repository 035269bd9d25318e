"""Masks in which 0 means "not labelled" and 1..K are the classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import DataError, FolderDataset, check, pack
from mcibi_fast.data.labels import check_labels, reduced_labels
from mcibi_fast.data.shards import ShardedDataset

SIZE = (16, 24)
HINT = "--set data.reduce_labels=true with train; --reduce-labels with data check, data pack"


def filled(*values: int, dtype: type = np.uint8) -> np.ndarray:
    """A mask of these values by turns."""
    return np.resize(np.array(values, dtype), SIZE)


@pytest.fixture
def counted(tree: Path, write_label: Callable[[str, np.ndarray], None]) -> Path:
    """The dataset of `tree` with masks of 0..3 and 255 for its three classes."""
    for i, name in enumerate(("train/a", "train/b", "train/c", "val/d")):
        write_label(name, np.roll(filled(0, 1, 2, 3, 255), i, axis=1))
    return tree


def grey(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(path)


def of_16_bits(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint16)).save(path)


def palette(path: Path, values: np.ndarray) -> None:
    mask = Image.fromarray(values.astype(np.uint8))
    mask.putpalette([9, 99, 200] * 256)
    mask.save(path)


@pytest.mark.parametrize(("save", "mode"), [(grey, "L"), (of_16_bits, "I;16"), (palette, "P")])
def test_every_value(tree: Path, save: Callable[[Path, np.ndarray], None], mode: str) -> None:
    values = np.resize(np.arange(256), SIZE)
    save(tree / "labels/train/a.png", values)
    assert Image.open(tree / "labels/train/a.png").mode == mode
    classes = [f"c{k}" for k in range(254)]
    data = FolderDataset(tree, "train", classes=classes, reduce_labels=True)
    label = data.read(0)[1]
    assert label.dtype == np.uint8 and label.shape == SIZE
    table = {0: 255, 255: 255} | {k: k - 1 for k in range(1, 255)}
    assert [table[value] for value in values.flat] == label.ravel().tolist()
    assert data[0]["label"].tolist() == label.tolist()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_every_type(dtype: type) -> None:
    mask = np.array([[0, 1, 2, 3]], dtype)
    assert reduced_labels(mask, 3, "x").tolist() == [[255, 0, 1, 2]]
    with pytest.raises(DataError, match="x: label 3 with 2 classes"):
        reduced_labels(mask, 2, "x")


def test_classes_are_counted_without_0(counted: Path, write_label) -> None:
    (counted / "classes.txt").unlink()
    assert FolderDataset(counted, "val").num_classes == 4
    for split in ("train", "val"):
        data = FolderDataset(counted, split, reduce_labels=True)
        assert data.classes == ["class_0", "class_1", "class_2"]
    write_label("val/d", filled(0, 254))
    assert FolderDataset(counted, "train", reduce_labels=True).num_classes == 254
    write_label("val/d", filled(0, 256, dtype=np.uint16))  # not 255, which is ignored
    with pytest.raises(DataError, match=r"^labels/val/d\.png: label 256 with 255 classes; use"):
        FolderDataset(counted, "train", reduce_labels=True)


@pytest.mark.parametrize(("value", "dtype"), [(4, np.uint8), (254, np.uint8), (256, np.uint16)])
def test_a_label_too_large_is_named_as_in_the_file(counted, write_label, value, dtype) -> None:
    write_label("train/a", filled(0, 3, value, dtype=dtype))
    with pytest.raises(DataError) as error:
        FolderDataset(counted, "train", reduce_labels=True).read(0)
    assert str(error.value) == (
        f"labels/train/a.png: label {value} with 3 classes; use 1..3, or 0 or 255 for pixels to "
        "ignore"
    )


@pytest.mark.parametrize(
    ("values", "hinted"), [((0, 3), True), ((0, 1, 4), False), ((3, 4), False)]
)
def test_the_hint(tree: Path, write_label, values: tuple[int, ...], hinted: bool) -> None:
    """It is for masks that the option would make right."""
    write_label("train/a", filled(*values))
    with pytest.raises(DataError, match=r"label \d with 3 classes; use 0\.\.2, or 255") as error:
        FolderDataset(tree, "train").read(0)
    assert (HINT in str(error.value)) == hinted and "\n" not in str(error.value)
    if hinted:
        label = FolderDataset(tree, "train", reduce_labels=True).read(0)[1]
        assert np.array_equal(label, filled(255, 2))
    with pytest.raises(DataError, match=r"for pixels to ignore$"):
        check_labels(filled(*values), 3, "x")


def test_not_with_binary_masks(counted: Path, tmp_path: Path, capsys) -> None:
    message = "binary and reduce_labels: give one of them"
    with pytest.raises(ValueError, match=message):
        FolderDataset(counted, "train", binary=True, reduce_labels=True)
    with pytest.raises(ValueError, match=message):
        check(counted, binary=True, reduce_labels=True, progress=False)
    both = ["--binary", "--reduce-labels", "--quiet"]
    assert cli.main(["data", "check", str(counted), *both, "--out", str(tmp_path / "out")]) == 2
    assert cli.main(["data", "pack", str(counted), str(tmp_path / "shards"), *both]) == 2
    assert capsys.readouterr().err.count(message) == 2


def test_data_check(counted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "check", str(counted), "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    printed, errors = capsys.readouterr()
    assert printed.count("label 3 with 3 classes") == printed.count(HINT) == 4
    assert errors.count("\n") == 1 and HINT in errors
    assert cli.main([*command, "--reduce-labels"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("no problems\n") and "classes  3\n" in printed
    report = check(counted, reduce_labels=True, progress=False)
    masks = [np.array(Image.open(path)) for path in counted.glob("labels/*/*.png")]
    counts = np.bincount(np.ravel(masks), minlength=256)
    assert report.pixels.tolist() == counts[1:4].tolist()
    assert report.ignored == counts[0] + counts[255]


def test_data_check_counts_classes_and_refuses_one(tree: Path, write_label) -> None:
    (tree / "classes.txt").unlink()
    for name in ("train/a", "train/b", "train/c", "val/d"):
        write_label(name, filled(0, 1, 2))
    report = check(tree, reduce_labels=True, progress=False)
    assert report.ok and report.classes == ["class_0", "class_1"]
    for name in ("train/a", "train/b", "train/c", "val/d"):
        write_label(name, filled(0, 1))
    problem = "masks hold 1 only, besides 0 and 255, which reduce_labels ignores; that leaves one"
    assert problem in check(tree, reduce_labels=True, progress=False).problems[0]
    with pytest.raises(DataError, match=problem):
        FolderDataset(tree, "train", reduce_labels=True)
    for name in ("train/a", "train/b", "train/c", "val/d"):
        write_label(name, filled(0, 255))
    with pytest.raises(DataError, match="every pixel of every mask is 0 or 255; no classes found"):
        FolderDataset(tree, "train", reduce_labels=True)
    assert "val: every pixel of its masks is 0 or 255 (ignored)" in "".join(
        check(tree, reduce_labels=True, progress=False).problems
    )


def test_packed_as_in_the_folder(counted: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "shards"
    command = ["data", "pack", "folder", str(counted), str(out), "--workers", "0", "--quiet"]
    assert cli.main([*command, "--reduce-labels"]) == 0
    for split in ("train", "val"):
        packed, folder = (
            ShardedDataset(out, split),
            FolderDataset(counted, split, reduce_labels=True),
        )
        assert packed.classes == folder.classes and len(packed) == len(folder)
        for i in range(len(folder)):
            pixels, label = folder.read(i)
            assert np.array_equal(packed.read(i)[0], pixels)
            assert np.array_equal(packed.read(i)[1], label)
            assert np.unique(label).tolist() == [0, 1, 2, 255]
    assert cli.main(["data", "check", str(out), "--quiet", "--out", str(tmp_path / "out")]) == 0
    pack(FolderDataset(counted, "val", reduce_labels=True), tmp_path / "b", "val", progress=False)
    assert np.array_equal(ShardedDataset(tmp_path / "b", "val").read(0)[1], packed.read(0)[1])
    capsys.readouterr()
    for name in ("lip", "coco"):
        assert cli.main(["data", "pack", name, str(counted), str(out), "--reduce-labels"]) == 2
        assert "--reduce-labels: a published dataset has its own" in capsys.readouterr().err
