"""Which files of a folder count, for datasets, checks, prediction and videos alike."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import DataError, FolderDataset, FolderVideos, check, pack
from mcibi_fast.data.images import FORMATS, IMAGE_SUFFIXES
from mcibi_fast.data.listing import distinct_names, list_images
from mcibi_fast.data.shards import ShardedDataset
from mcibi_fast.errors import DataWarning
from mcibi_fast.inference.predict import _output_names, find_images
from mcibi_fast.inference.video_io import FolderFrames


def write(path: Path, value: int = 0) -> None:
    """A picture full of ``value``, or a mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (8, 12) if "labels" in path.parts else (8, 12, 3)
    form = {end: form for form, ends in FORMATS.items() for end in ends}
    picture = Image.fromarray(np.full(shape, value, np.uint8))
    picture.save(path, form.get(path.suffix.lower(), "PNG"))


def dataset(root: Path, images: Sequence[str], masks: Sequence[str]) -> Path:
    """Images and masks of train, each full of its position; four classes."""
    for kind, names in (("images", images), ("labels", masks)):
        for i, name in enumerate(names):
            write(root / kind / "train" / name, i)
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    return root


JUNK = ("._a.jpg", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg")


def test_hidden_files_and_those_of_systems_do_not_count(tmp_path: Path, recwarn) -> None:
    for name in ("b.jpg", "a.JPG", "x/c.png", "x/y/d.TIF", *JUNK):
        write(tmp_path / name)
    for name in ("notes.txt", "e.gif", "f.GIF", "README"):
        (tmp_path / name).write_bytes(b"x")
    found = list_images(tmp_path)
    assert found.paths == ["a.JPG", "b.jpg", "x/c.png", "x/y/d.TIF"]
    assert found.describe() == (
        "2 .gif (such as e.gif), 1 .txt (such as notes.txt), "
        "5 hidden or of the system (such as .DS_Store), 1 without an ending (such as README)"
    )
    assert "hidden" not in found.describe(hidden=False)
    flat = list_images(tmp_path, nested=False)
    assert flat.paths == ["a.JPG", "b.jpg"] and "1 folders (such as x)" in flat.describe()


def test_links_are_followed_but_not_round(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/a.jpg")
    write(tmp_path / "images/b.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "images/linked")
    os.symlink(tmp_path / "images", tmp_path / "elsewhere/back")
    found = list_images(tmp_path / "images")
    assert found.paths == ["b.jpg", "linked/a.jpg"]
    assert found.describe() == "1 links to a folder above (such as linked/back/)"


def test_every_suffix_counts_everywhere(tmp_path: Path) -> None:
    suffixes = sorted(IMAGE_SUFFIXES) + [".JPG", ".Tiff", ".WEBP"]
    names = [f"{i}{suffix}" for i, suffix in enumerate(suffixes)]
    root = dataset(tmp_path, names, [f"{i}.png" for i in range(4)])
    for i in range(len(names)):
        write(root / f"labels/train/{i}.png", 1)
    expected = [str(i) for i in range(len(names))]
    train = FolderDataset(root, "train")
    assert sorted((train.name(i) for i in range(len(train))), key=int) == expected
    assert check(root, progress=False).pairs == {"train": len(names)}
    found = [path.name for path in find_images(root / "images/train")]
    assert sorted(found) == sorted(names)
    assert [frame.name for frame in FolderFrames(root / "images/train")] == expected


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = dataset(tmp_path, ["a.jpg", *JUNK], ["a.png", *JUNK])
    (root / "images/train/b.gif").write_bytes(b"GIF89a")
    (root / "images/stray.jpg").write_bytes(b"x")
    (root / "images/.ipynb_checkpoints").mkdir()  # no split
    text = "left out 1 .gif (such as b.gif)"
    with pytest.warns(DataWarning, match=r"images/train: left out 1 \.gif \(such as b\.gif\)$"):
        train = FolderDataset(root, "train")
    assert [train.name(i) for i in range(len(train))] == ["a"]
    with pytest.warns(DataWarning, match=r"left out 1 \.gif \(such as b\.gif\)$"):
        find_images(root / "images/train")
    with pytest.warns(DataWarning, match=r"left out 1 \.gif \(such as b\.gif\)$"):
        FolderFrames(root / "images/train")
    out = str(tmp_path / "out")
    assert cli.main(["data", "check", "folder", str(root), "--out", out, "--quiet"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert f"{text.replace('left out', 'left out images/train:')}, 5 hidden or of the" in printed
    assert "left out labels/train: 5 hidden or of the system" in printed
    assert "left out images: 1 images in no split (such as stray.jpg)" in printed
    assert "splits   train 1\n" in printed
    arguments = [str(root), out, "--split", "train", "--workers", "0", "--quiet"]
    assert cli.main(["data", "pack", "folder", *arguments]) == 0
    assert capsys.readouterr().err == f"mcibi-fast: warning: {root}: images/train: {text}\n"


def test_a_folder_of_other_formats_alone(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    for read in (find_images, FolderFrames):
        with pytest.raises(ValueError, match=r"holds no .*; left out 1 \.heic \(such as a\.heic\)"):
            read(tmp_path)


def test_masks_match_in_any_case_and_png_comes_first(tmp_path: Path) -> None:
    root = dataset(tmp_path, ["a.jpg", "b.JPG", "c.png"], ["a.PNG", "b.tiff", "c.bmp"])
    write(root / "labels/train/c.png", 3)
    train = FolderDataset(root, "train")
    assert [int(train.read(i)[1][0, 0]) for i in range(3)] == [0, 1, 3]
    assert check(root, progress=False).spare == ["labels/train/c.bmp"]


def test_spellings_of_one_letter_match(tmp_path: Path) -> None:
    """Systems and archives write accents either way."""
    root = dataset(tmp_path, ["caf\u00e9.jpg"], ["cafe\u0301.png"])
    assert FolderDataset(root, "train").read(0)[1].shape == (8, 12)


def test_two_images_of_one_name_do_not_share_a_mask(tmp_path: Path) -> None:
    root = dataset(tmp_path, ["a.jpg", "a.png", "b.jpg"], ["a.png", "b.png"])
    message = "images/train/a.jpg: has the name, and so the mask, of images/train/a.png"
    with pytest.raises(DataError, match=f"^{message}; rename one of them and its mask"):
        FolderDataset(root, "train")
    report = check(root, progress=False)
    assert len(report.problems) == 1 and report.problems[0].startswith(message)
    assert report.pairs == {"train": 1}


def test_subfolders_are_read_as_names(tmp_path: Path) -> None:
    """Equal names in different folders are different images."""
    names = ["city/a_1", "city/a_2", "town/a_1", "a_1"]
    root = dataset(tmp_path, [f"{n}.jpg" for n in names], [f"{n}.png" for n in names])
    train = FolderDataset(root, "train")
    by_name = {train.name(i): int(train.read(i)[1][0, 0]) for i in range(len(train))}
    assert by_name == {name: i for i, name in enumerate(names)}
    report = check(root, progress=False)
    assert report.ok and report.pairs == {"train": 4}
    videos = FolderVideos(root, "train")
    assert videos.videos() == ["a", "city/a", "town/a"]
    assert videos.frame_name(1, 1) == "city/a_2"
    pack(train, tmp_path / "out", "train", progress=False)
    packed = ShardedDataset(tmp_path / "out", "train")
    assert [packed.name(i) for i in range(4)] == [train.name(i) for i in range(4)]
    (root / "labels/train/town/a_1.png").unlink()
    with pytest.raises(DataError, match=r"^labels/train/town/a_1\.png: missing mask; add it"):
        FolderDataset(root, "train")


def test_outputs_never_meet() -> None:
    """Whatever the inputs are called, also if one is called as the output of another."""
    assert distinct_names(["a.jpg", "b.png", "x/a.png"]) == ["a", "b", "x/a"]
    assert distinct_names(["a.jpg", "a.png", "a.jpg.bmp"]) == ["a.jpg", "a.png", "a.jpg.bmp"]
    parts = ("a", ".jpg", ".png", ".tif")
    every = ["".join(parts[i] for i in (0, *more)) for n in (1, 2, 3)
             for more in itertools.product((1, 2, 3), repeat=n)]  # fmt: skip
    draw = random.Random(0)
    for _ in range(200):
        paths = draw.sample(every, draw.randint(1, len(every)))
        assert len(set(distinct_names(paths))) == len(paths)


def test_names_of_outputs_are_linear_in_images(tmp_path: Path) -> None:
    images = [tmp_path / "in" / f"{i}.jpg" for i in range(8000)]
    names = _output_names([*images, tmp_path / "in" / "7.png"], tmp_path)
    assert str(names[5]) == "in/5.png"
    assert (str(names[7]), str(names[-1])) == ("in/7.jpg.png", "in/7.png.png")


def test_frames_of_one_name(tmp_path: Path) -> None:
    for name in ("1.jpg", "1.png", "1.jpg.bmp", "2.jpg"):
        write(tmp_path / name)
    frames = [frame.name for frame in FolderFrames(tmp_path)]
    assert sorted(frames) == ["1.jpg", "1.jpg.bmp", "1.png", "2"]
