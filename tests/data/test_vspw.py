"""VSPW: what its files are known to hold besides what they should."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mcibi_fast.data import VSPW, ClipDataset, DataError
from tests.data import trees


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.vspw(tmp_path / "tree")  # apart from what is packed beside it


def mask_file(root: Path, video: str = "1_a", number: int = 10) -> Path:
    return root / "VSPW_480p" / "data" / video / "mask" / f"{number:08d}.png"


def image_file(root: Path, video: str = "1_a", number: int = 10) -> Path:
    return root / "VSPW_480p" / "data" / video / "origin" / f"{number:08d}.jpg"


def test_videos_and_labels(root: Path) -> None:
    dataset = VSPW(root, "train")
    assert dataset.videos() == ["1_a", "2_b"]
    assert [dataset.frames(v) for v in range(2)] == [3, 2]
    assert [dataset.name(i) for i in range(len(dataset))] == [
        "1_a/00000010", "1_a/00000011", "1_a/00000012", "2_b/00000010", "2_b/00000011",
    ]  # fmt: skip
    values = np.array(Image.open(mask_file(root)))
    expected = np.where(values == 0, 255, values - 1)
    assert np.array_equal(dataset.read(0)[1], expected)
    assert set(np.unique(expected)) == {*range(124), 255}
    assert np.array_equal(dataset.frame(0, 0)["label"], expected)
    clip = ClipDataset(dataset, history=2)[4]
    assert clip["name"] == "2_b/00000011"
    torch.testing.assert_close(clip["past"][1], dataset.frame(1, 0)["image"])


def test_values_that_are_no_class_are_ignored_counted_and_warned_of_once(root: Path) -> None:
    for number, odd in ((10, [252, 253]), (11, [254, 125, 255])):
        values = np.full(trees.SIZE, 7, np.uint8)
        values[0, : len(odd)] = odd
        Image.fromarray(values).save(mask_file(root, number=number))
    dataset = VSPW(root, "train")
    with pytest.warns(
        UserWarning, match=r"00000010\.png: 2 pixels hold 252, 253, which is"
    ) as seen:
        labels = [dataset.read(i)[1] for i in range(3)]
        dataset.read(0)
    assert len(seen) == 1
    assert labels[0][0].tolist() == [255, 255] + [6] * 16
    assert labels[1][0].tolist() == [255, 255, 255] + [6] * 15
    assert dataset.odd_values == {252: 2, 253: 2, 254: 1, 125: 1}  # frame 10 was read twice


def test_workers_count_odd_values_too(root: Path) -> None:
    Image.fromarray(np.full(trees.SIZE, 253, np.uint8)).save(mask_file(root))
    dataset = VSPW(root, "train")
    list(DataLoader(dataset, num_workers=2))
    assert dataset.odd_values == {253: 12 * 18}


def test_masks_of_16_bits(root: Path) -> None:
    values = np.full(trees.SIZE, 124, np.uint16)
    values[0, 0] = 300
    Image.fromarray(values).save(mask_file(root))
    label = VSPW(root, "train").read(0)[1]
    assert label[0, 0] == 255 and (label.ravel()[1:] == 123).all()


def test_empty_images_and_colour_masks_are_named(root: Path) -> None:
    image_file(root).write_bytes(b"")
    Image.new("RGB", trees.SIZE[::-1]).save(mask_file(root, number=11))
    mask_file(root, "2_b", 11).write_bytes(b"")
    dataset = VSPW(root, "train")
    with pytest.raises(DataError, match=r"data/1_a/origin/00000010\.jpg: empty \(0 bytes\)"):
        dataset.frame(0, 0)
    with pytest.raises(DataError, match=r"data/1_a/mask/00000011\.png: a colour mask \(RGB\)"):
        dataset.frame(0, 1)
    with pytest.raises(DataError, match=r"data/2_b/mask/00000011\.png: empty \(0 bytes\)"):
        dataset.frame(1, 1)


@pytest.mark.parametrize("zipped", [False, True])
def test_bad_files_are_skipped_and_counted(root: Path, tmp_path: Path, zipped: bool) -> None:
    image_file(root).write_bytes(b"")  # the first frame of 1_a
    image_file(root, number=12).unlink()
    Image.new("RGB", trees.SIZE[::-1]).save(mask_file(root, "2_b", 10))
    mask_file(root, "2_b", 11).write_bytes(b"not a mask")
    place = trees.pack(root, tmp_path / "all.zip") if zipped else root
    with pytest.warns(
        UserWarning,
        match=r"VSPW train: 2 frames left out and 2 masks not used of 5, empty, missing",
    ):
        dataset = VSPW(place, "train", bad="skip")
    assert [Path(path).name for path in dataset.skipped] == [
        "00000010.jpg", "00000012.jpg", "00000010.png", "00000011.png",
    ]  # fmt: skip
    assert [dataset.frames(v) for v in range(2)] == [1, 2]
    assert [list(dataset.labelled(v)) for v in range(2)] == [[0], []]
    assert len(dataset) == 1 and dataset[0]["name"] == "1_a/00000011"
    assert [frame["label"] for frame in dataset.stream(1)] == [None, None]


def test_a_whole_set_skips_nothing(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = VSPW(root, "train", bad="skip")
    assert dataset.skipped == [] and len(dataset) == 5


def test_palette_masks_are_indices(root: Path) -> None:
    expected = trees.write_mask(mask_file(root), [1, 2, 124], palette=True)
    assert np.array_equal(VSPW(root, "train", bad="skip").read(0)[1], expected - 1)


def test_frames_without_masks_are_streamed_and_no_samples(root: Path) -> None:
    shutil.rmtree(mask_file(root, "4_d").parent)
    dataset = VSPW(root, "test")
    assert (len(dataset), dataset.videos(), dataset.frames(0)) == (0, ["4_d"], 2)
    frames = list(dataset.stream(0))
    assert [frame["name"] for frame in frames] == ["4_d/00000010", "4_d/00000011"]
    assert all(frame["label"] is None for frame in frames)
    assert len(ClipDataset(dataset, frames="one")) == 0


def test_only_videos_of_test_may_have_no_masks(root: Path) -> None:
    shutil.rmtree(mask_file(root, "3_c").parent)
    with pytest.raises(DataError, match=r"3_c/mask/00000010\.png: missing \(and 1 more files\)"):
        VSPW(root, "val")


def test_a_listed_video_that_is_not_there(root: Path) -> None:
    trees.write_list(root / "VSPW_480p" / "val.txt", ["3_c", "5_e"])
    with pytest.raises(DataError, match=r"data/5_e/origin/\*\.jpg: missing"):
        VSPW(root, "val")


def test_files_of_the_finder_are_no_frames(root: Path) -> None:
    (image_file(root).parent / ".DS_Store").write_bytes(b"x")
    (image_file(root).parent / "._00000010.jpg").write_bytes(b"x")
    (mask_file(root).parent / "Thumbs.db").write_bytes(b"x")
    assert VSPW(root, "train").frames(0) == 3


def test_names_come_from_the_json_file(root: Path) -> None:
    file = root / "VSPW_480p" / "label_num_dic_final.json"
    assert VSPW(root, "train").classes == VSPW.classes
    names = {f"thing {k}": str(k) for k in range(124, -1, -1)}
    file.write_text(json.dumps(names))
    assert VSPW(root, "train").classes == [f"thing {k}" for k in range(1, 125)]
    for content, message in (
        ("[1, 2]", "not a table of names and numbers"),
        ("{", "not a table of names and numbers"),
        ('{"wall": "one"}', "not a table of names and numbers"),
        ('{"wall": "1"}', r"1 classes; expected the numbers 1\.\.124"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=f"label_num_dic_final.json: {message}"):
            VSPW(root, "train")
    file.unlink()
    assert VSPW(root, "train").classes == VSPW.classes


def test_bad_argument(root: Path) -> None:
    with pytest.raises(ValueError, match="bad: expected 'raise' or 'skip', got 'ignore'"):
        VSPW(root, "train", bad="ignore")  # type: ignore[arg-type]
