"""What `data check` says about datasets whose files can all be read, and which are wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import DataError, FolderDataset, pack
from mcibi_fast.data.shards import ShardedDataset

SIZE = (8, 12)


def dataset(root: Path, *, classes: Sequence[str] = (), **splits: Sequence[int]) -> Path:
    """One image and mask of each split; masks hold all of the values."""
    for split, values in splits.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        Image.new("RGB", SIZE[::-1], (9, 99, 200)).save(root / f"images/{split}/a.jpg")
        mask = np.resize(np.array(values, np.uint8), SIZE)
        Image.fromarray(mask).save(root / f"labels/{split}/a.png")
    if classes:
        (root / "classes.txt").write_text("\n".join(classes))
    return root


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Status and output of `data check`; errors are the first problem."""

    def check(root: Path, *options: str) -> tuple[int, str]:
        arguments = ["data", "check", *options, str(root), "--out", str(tmp_path / "out")]
        status = cli.main([*arguments, "--quiet"])
        printed, errors = capsys.readouterr()
        assert errors.count("\n") == (status == 2)
        return status, printed

    return check


def test_a_plausible_dataset(tmp_path: Path, run) -> None:
    root = dataset(tmp_path / "data", classes="abc", train=[0, 1, 2, 255], val=[0, 1, 2])
    status, printed = run(root)
    assert status == 0 and printed.endswith("no problems\n") and "warning" not in printed


@pytest.mark.parametrize("classes", [(), ("background", "crack")])
def test_binary_masks(tmp_path: Path, run, classes: Sequence[str]) -> None:
    root = dataset(tmp_path / "data", classes=classes, train=[0, 0, 255], val=[0, 255])
    status, printed = run(root)
    assert status == 2 and "no problems" not in printed
    assert "the masks hold 0 and 255 only, and 255 is ignored" in printed
    assert "data.binary=true" in printed and "--binary" in printed
    status, printed = run(root, "--binary")
    assert status == 0 and printed.endswith("no problems\n")
    assert f"1 {classes[1] if classes else 'foreground'}" in printed


def test_binary_masks_are_two_classes(tmp_path: Path) -> None:
    root = dataset(tmp_path / "data", train=[0, 0, 255], val=[0, 0, 1])
    for split in ("train", "val"):
        binary = FolderDataset(root, split, binary=True)
        assert binary.classes == ["background", "foreground"]
        label = binary.read(0)[1]
        assert np.array_equal(label, np.resize(np.uint8([0, 0, 1]), SIZE))
    # Without the option they would be one class.
    (root / "labels/val/a.png").unlink()
    (root / "images/val/a.jpg").unlink()
    (root / "images/val").rmdir()
    with pytest.raises(DataError, match=r"0 and 255 only.*one class; .*--set data\.binary=true"):
        FolderDataset(root, "train")
    pack(FolderDataset(root, "train", binary=True), tmp_path / "out", "train", progress=False)
    packed = ShardedDataset(tmp_path / "out", "train")
    assert packed.num_classes == 2 and np.unique(packed.read(0)[1]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ([0, 1, 255], (), r"labels/train/a\.png: not a binary mask .*: holds 0, 1, 255"),
        ([0, 3, 7], (), r"labels/train/a\.png: not a binary mask of 0 and 255, or of 0 and 1"),
        ([0, 255], "abc", r"classes\.txt: 3 classes, but binary masks have 2"),
    ],
)
def test_other_masks_are_not_binary(tmp_path: Path, values, classes, message: str) -> None:
    root = dataset(tmp_path, classes=classes, train=values)
    with pytest.raises(DataError, match=message):
        FolderDataset(root, "train", binary=True).read(0)


def test_binary_masks_are_packed_by_the_command_line(tmp_path: Path, run) -> None:
    root, out = dataset(tmp_path / "data", train=[0, 255], val=[255, 0]), tmp_path / "shards"
    options = ["--workers", "0", "--quiet"]
    assert cli.main(["data", "pack", "folder", str(root), str(out), "--binary", *options]) == 0
    assert "1 foreground" in run(out)[1]
    with pytest.raises(DataError, match="one class"):
        FolderDataset(root, "train")
    assert cli.main(["data", "pack", "lip", str(root), str(out), "--binary", *options]) == 2


def test_a_class_without_a_pixel(tmp_path: Path, run) -> None:
    root = dataset(tmp_path / "data", classes="abcd", train=[0, 2, 255], val=[0, 2])
    status, printed = run(root)
    assert status == 0 and "no problems" not in printed
    assert "warning  no pixel has the class b, d; are the list of classes and" in printed


def test_a_split_that_is_all_ignored(tmp_path: Path, run) -> None:
    root = dataset(tmp_path / "data", classes="ab", train=[0, 1], val=[255])
    status, printed = run(root)
    assert status == 2 and "no problems" not in printed
    assert "val: every pixel of its masks is 255 (ignored), so nothing can be learnt" in printed
    root = dataset(tmp_path / "none", train=[255])
    assert "train: every pixel of its masks is 255" in run(root)[1]


def test_classes_that_lossy_compression_made_up(tmp_path: Path, run) -> None:
    """Kept as JPEG, a mask is refused; saved as PNG afterwards, it has too many classes."""
    root = dataset(tmp_path / "data", train=[0])
    rng = np.random.default_rng(0)
    mask = rng.choice(np.uint8([0, 40, 120]), (32, 48)).repeat(8, 0).repeat(8, 1)
    Image.new("RGB", mask.shape[::-1]).save(root / "images/train/a.jpg")
    (root / "labels/train/a.png").unlink()
    for name in ("a.jpg", "a.png"):  # a JPEG in a file called PNG, too
        path = root / "labels/train" / name
        Image.fromarray(mask).save(path, "JPEG", quality=90)
        status, printed = run(root)
        assert status == 2 and "no problems" not in printed
        assert f"labels/train/{name}: a mask in lossy compression" in printed
        with pytest.raises(DataError, match="a mask in lossy compression"):
            FolderDataset(root, "train")
        smeared = np.array(Image.open(path))
        path.unlink()
    Image.fromarray(smeared).save(root / "labels/train/a.png")
    status, printed = run(root)
    assert "no problems" not in printed
    assert "hardly a pixel: they look like grey levels or like masks that lossy" in printed


def test_grey_levels_instead_of_indices(tmp_path: Path, run) -> None:
    root = dataset(tmp_path / "data", train=[0, 85, 170])
    printed = run(root)[1]
    assert "no problems" not in printed and "taken to have 171 classes, 168 of which" in printed


@pytest.mark.parametrize("damage", ["cut off", "of something else", "of other numbers"])
def test_a_broken_index(tmp_path: Path, run, damage: str) -> None:
    root, out = dataset(tmp_path / "data", train=[0, 1], val=[1, 0]), tmp_path / "shards"
    for split in ("train", "val"):
        pack(FolderDataset(root, split), out, split, progress=False)
    assert run(out)[1].endswith("no problems\n")
    index = out / "val/index.json"
    content = json.loads(index.read_text())
    index.write_text(
        {
            "cut off": index.read_text()[:-9],
            "of something else": '{"a": 1}',
            "of other numbers": json.dumps(content | {"palette": []}),
        }[damage]
    )
    status, printed = run(out)
    assert status == 2 and "splits   train 1, val 0" in printed and "no problems" not in printed
    assert f"{index}: not an index of shards (" in printed
    (out / "train/index.json").write_text("")
    status, printed = run(out)
    assert status == 2 and f"{out / 'train/index.json'}: not an index of shards" in printed
    if damage == "of something else":  # so nothing says that these are shards
        with pytest.raises(DataError, match=r"no folder 'images'.*/train/index\.json is not an"):
            FolderDataset(out, "train")


def test_equal_names_in_shards_are_all_checked(tmp_path: Path, run) -> None:
    root, out = dataset(tmp_path / "data", train=[0, 1]), tmp_path / "shards"
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        file = root / kind / "train" / f"a.{suffix}"
        file.with_stem("b").write_bytes(file.read_bytes())
    pack(FolderDataset(root, "train"), out, "train", progress=False)
    index = out / "train/index.json"
    index.write_text(index.read_text().replace('["b", ', '["a", '))
    assert "splits   train 2\n" in run(out)[1]
    shard = out / "train/000000.tar"
    content = bytearray(shard.read_bytes())
    row = json.loads(index.read_text())["samples"][0]
    content[row[2] + 30] ^= 0xFF
    shard.write_bytes(content)
    status, printed = run(out)
    assert status == 2 and "damaged, the checksum is wrong" in printed


def test_folder_as_a_name(tmp_path: Path, run) -> None:
    root = dataset(tmp_path / "data", train=[0, 1, 2])
    assert run(root, "folder") == run(root)
    assert "1 y" in run(root, "--classes=x,y,z", "folder")[1]
