"""Names in lists and archives stay below the dataset's root; lists that are too large or none."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.data import DATASETS, DataError, FolderDataset
from mcibi_fast.data.archives import Files
from mcibi_fast.data.folder import class_list
from mcibi_fast.data.folder_video import usual_step
from mcibi_fast.data.pascal_context import convert
from tests.data import trees
from tests.security import attacks, places
from tests.security.forked import bounded, command, refused

# Of each dataset that has lists: the list that an attack changes, and one split that reads it.
LISTS = {
    "voc": ("VOC2012/ImageSets/Segmentation/val.txt", "val"),
    "lip": ("val_id.txt", "val"),
    "cihp": ("Validation/val_id.txt", "val"),
    "coco_stuff": ("imageLists/test.txt", "test"),
    "pascal_context": ("VOC2010/ImageSets/SegmentationContext/val.txt", "val"),
    "vspw": ("VSPW_480p/val.txt", "val"),
}


@pytest.fixture(params=LISTS)
def listed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path, str]:
    """A dataset's name and root, the list, and a split."""
    path, split = LISTS[request.param]
    root = trees.WRITERS[request.param](tmp_path / "root")
    return request.param, root, root / path, split


@pytest.mark.parametrize(
    "name", ["../../secret", "x/../../../secret", "/etc/passwd", "..", "a/..", "../root/a"]
)
@pytest.mark.thinned(always={"name": ["../../secret"]})
def test_a_name_that_leads_out(listed: tuple[str, Path, Path, str], name: str) -> None:
    """The name is refused before any file is looked for, whether or not it exists."""
    dataset, root, path, split = listed
    path.write_text(f"{name}\n")
    message = rf"{path.name}: '{name}' leads out of the dataset's folder"
    with pytest.raises(DataError, match=message):
        DATASETS[dataset](root, split)
    error = refused("data", "check", dataset, root, "--out", root / "out", "--quiet")
    assert "leads out of" in error
    arguments = ("--split", split, "--workers", "0", "--quiet")
    assert "leads out of" in refused("data", "pack", dataset, root, root / "out", *arguments)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 600, "a\0b"])
@pytest.mark.thinned
def test_a_name_of_no_file(listed: tuple[str, Path, Path, str], name: str) -> None:
    dataset, root, path, split = listed
    path.write_text(f"{name}\n")
    with pytest.raises(DataError, match=r"\.txt: '.{,100}' cannot be the name of a file") as error:
        DATASETS[dataset](root, split)
    assert len(str(error.value)) < 300


def test_pictures_outside_are_not_read(tmp_path: Path) -> None:
    """The attack as it was: images and masks beside the root, and a list that names them."""
    root = trees.voc(tmp_path / "root")
    for kind in ("JPEGImages", "SegmentationClass"):
        shutil.copytree(root / "VOC2012" / kind, tmp_path / "secret" / kind)
    for kind in ("JPEGImages", "SegmentationClass"):
        (root / "VOC2012" / kind / "x").mkdir()
    (root / "VOC2012/ImageSets/Segmentation/val.txt").write_text("../../../secret/JPEGImages/v\n")
    with pytest.raises(DataError, match="leads out of"):
        DATASETS["voc"](root, "val")


def test_nothing_asks_for_a_file_outside(tmp_path: Path) -> None:
    """Below all datasets, should one of them forget to look at its names."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "root").mkdir()
    files = Files(tmp_path / "root")
    for path in ("../secret.txt", str(tmp_path / "secret.txt"), "a/../../secret.txt"):
        for read in (files.read, files.lines, files.names, files.describe):
            with pytest.raises(DataError, match="leads out of"):
                read(path)
        with pytest.raises(DataError, match="leads out of"):
            files.head(path, 1)


@pytest.mark.parametrize("outside", ["../secret/", "/{tmp}/secret/", "a/../../secret/"])
@pytest.mark.parametrize("within", [False, True], ids=["zip file", "folder with a zip file"])
def test_members_of_zip_files_that_lead_out(tmp_path: Path, outside: str, within: bool) -> None:
    """A zip file in a folder: what its members are called may lie in the folder instead."""
    trees.ade20k(tmp_path / "secret")
    top = outside.replace("{tmp}", str(tmp_path)[1:])
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / "ade.zip", "w") as archive:
        for path in (tmp_path / "secret").rglob("*.*g"):
            archive.writestr(f"{top}{path.relative_to(tmp_path / 'secret')}", path.read_bytes())
    source = root if within else root / "ade.zip"
    with pytest.raises(DataError, match=r"ade\.zip: '.+' leads out of the dataset's folder"):
        DATASETS["ade20k"](source, "train")


# Lists


def lists(root: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Small text files, and what reads them."""
    folder = places.folder(root / "folder")
    lip, vspw = trees.lip(root / "lip"), trees.vspw(root / "vspw")
    return {
        "classes.txt": (folder / "classes.txt", lambda: class_list(folder)),
        "classes.json": (folder / "classes.json", lambda: class_list(folder)),
        "a list": (lip / "val_id.txt", lambda: DATASETS["lip"](lip, "val")),
        "names of classes": (
            vspw / "VSPW_480p/label_num_dic_final.json",
            lambda: DATASETS["vspw"](vspw, "val"),
        ),
        "annotations": (lip / "trainval_merged.json", lambda: annotated(lip)),
    }


def annotated(root: Path) -> dict[str, int]:
    (root / "JPEGImages").mkdir(exist_ok=True)
    return convert(root)


TEXTS = ["classes.txt", "classes.json", "a list", "names of classes", "annotations"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_too_large(tmp_path: Path, text: str) -> None:
    path, read = lists(tmp_path)[text]
    path.unlink(missing_ok=True)
    attacks.make_sparse(path)
    outcome = bounded(read, megabytes=100)
    limit = "MAX_ANNOTATION_BYTES" if text == "annotations" else "MAX_TEXT_BYTES"
    assert outcome.error.startswith("DataError: ")
    assert f"{path.name}: 1,099,511,627,776 bytes, more than {limit} (" in outcome.error


def test_many_names(listed: tuple[str, Path, Path, str]) -> None:
    """Each name is a few bytes in the list and takes a hundred times more as a sample."""
    dataset, root, path, split = listed
    path.write_text("a\n" * 1_000_001)
    error = bounded(DATASETS[dataset], root, split, megabytes=200).error
    assert f"{path.name}: 1,000,001 names, more than MAX_NAMES (1,000,000)" in error


def test_one_video_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video that is listed several times counts with all its frames each time."""
    root = trees.vspw(tmp_path / "vspw")
    path = root / "VSPW_480p/train.txt"
    path.write_text("".join(f"{'./' * i}1_a\n" for i in range(400)))
    assert len(DATASETS["vspw"](root, "train")) == 1200
    monkeypatch.setenv("MCIBI_FAST_MAX_NAMES", "1199")
    with pytest.raises(DataError, match=r"train\.txt: 1,200 frames, more than MAX_NAMES"):
        DATASETS["vspw"](root, "train")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_texts_that_never_end(tmp_path: Path, text: str, kind: str) -> None:
    path, read = lists(tmp_path)[text]
    path.unlink(missing_ok=True)
    make, reason = attacks.NO_IMAGES[kind]
    make(path)
    outcome = bounded(read, megabytes=100)
    if text.startswith("classes"):  # it is no file, so it lists no classes
        assert outcome.error == ""
    else:
        assert outcome.error.startswith("DataError: ") and reason in outcome.error


@pytest.mark.parametrize("text", ["classes.json", "names of classes", "annotations"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("1" * 5000, "4300"),
        ("\x00", ""),
        ('{"x": 1e999}', ""),
        ('["\\ud800"]', ""),
        ("null", ""),
    ],
)
def test_json_that_is_none(tmp_path: Path, text: str, content: str, message: str) -> None:
    path, read = lists(tmp_path)[text]
    path.write_text(content)
    outcome = bounded(read, megabytes=200)
    if (text, content) == ("classes.json", '["\\ud800"]'):
        return  # an odd name
    assert outcome.error.startswith("DataError: ") and path.name in outcome.error, outcome
    assert message in outcome.error and "\n" not in outcome.error


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x" * 256, "y"], "a name that is no text of up to 255 characters"),
        ([f"{i}" for i in range(256)], "256 classes; 1 to 255 are possible"),
        ([], "0 classes; 1 to 255"),
    ],
)
def test_names_of_classes(tmp_path: Path, names: list[str], message: str) -> None:
    """A report pads every line to the longest name."""
    root = places.folder(tmp_path / "data")
    for write in (
        lambda: (root / "classes.txt").write_text("\n".join(names)),
        lambda: (root / "classes.json").write_text(json.dumps(names)),
    ):
        write()
        with pytest.raises(DataError, match=message):
            FolderDataset(root, "val")


def test_a_class_list_in_another_encoding_names_itself(tmp_path: Path) -> None:
    root = places.folder(tmp_path / "data")
    (root / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"^classes\.txt: not a text file in UTF-8"):
        FolderDataset(root, "val")


# PASCAL-Context's annotations


def annotation(**changes: object) -> dict:
    image = {"file_name": "2008_1.jpg", "image_id": 1, "height": 4, "width": 5, "phase": "train"}
    counts = changes.pop("counts", [0, 20])
    region = {"image_id": 1, "category_id": 2, "segmentation": {"size": [4, 5], "counts": counts}}
    image.update(changes)
    region["segmentation"]["size"] = [image["height"], image["width"]]
    return {"images": [image], "annos_segmentation": [region]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 10**6, "width": 10**6}, "more than MAX_PIXELS"),
        ({"height": 10**12}, "more than MAX_PIXELS"),
        ({"height": -4, "width": -5}, "has no size"),
        ({"height": 4.0}, "has no size"),
        ({"counts": [0, 10**12]}, "run lengths that do not fill the image"),
        ({"counts": [10**12, 20 - 10**12]}, "run lengths that do not fill the image"),
        ({"counts": [0.5] * 40}, "run lengths that do not fill the image"),
        ({"counts": "o" * 1_000_000}, "run lengths that are none"),
        ({"counts": "\x00" * 10}, "run lengths that are none"),
        ({"file_name": "a" * 300 + ".jpg"}, "cannot be the name of a file"),
        ({"file_name": "a\0b.jpg"}, "cannot be the name of a file"),
        ({"file_name": 3}, "not PASCAL-Context's annotations"),
        ({"phase": "../../x"}, "not PASCAL-Context's annotations"),
        ({"image_id": [1]}, "not PASCAL-Context's annotations"),
    ],
)
def test_annotations_that_ask_for_too_much(tmp_path: Path, changes: dict, message: str) -> None:
    (tmp_path / "VOC2010/JPEGImages").mkdir(parents=True)
    path = tmp_path / "VOC2010/trainval_merged.json"
    path.write_text(json.dumps(annotation(**changes)))
    error = refused("data", "convert", "pascal_context", tmp_path, "--quiet", megabytes=200)
    assert message in error


def test_many_regions_of_a_large_image(tmp_path: Path) -> None:
    """Each region would be drawn over 64 megapixels."""
    (tmp_path / "VOC2010/JPEGImages").mkdir(parents=True)
    content = annotation(height=8000, width=8000, counts=[64_000_000])
    content["annos_segmentation"] *= 10_000
    (tmp_path / "VOC2010/trainval_merged.json").write_text(json.dumps(content))
    error = refused("data", "convert", "pascal_context", tmp_path, "--quiet")
    assert "more than MAX_PIXELS" in error


def test_names_that_lead_out_of_the_masks_folder(tmp_path: Path) -> None:
    (tmp_path / "VOC2010/JPEGImages").mkdir(parents=True)
    content = annotation(file_name="../../../../2008_1.jpg")
    (tmp_path / "VOC2010/trainval_merged.json").write_text(json.dumps(content))
    assert convert(tmp_path) == {"train": 1, "val": 0}
    assert [p.name for p in tmp_path.rglob("2008_1.png")] == ["2008_1.png"]
    assert (tmp_path / "VOC2010/SegmentationClassContext/2008_1.png").is_file()


# Frames


def test_numbers_of_many_frames() -> None:
    """All steps differ: counting each of them among the others took minutes."""
    numbers = np.cumsum(np.arange(1, 60_000)).tolist()
    assert bounded(usual_step, numbers).value == 2


def test_a_frames_number_of_many_digits(tmp_path: Path) -> None:
    root = trees.vspw(tmp_path / "vspw")
    for kind, ending in (("origin", "jpg"), ("mask", "png")):
        folder = root / "VSPW_480p/data/1_a" / kind
        os.rename(folder / f"00000010.{ending}", folder / f"{'9' * 240}.{ending}")
    outcome = command("data", "check", "vspw", root, "--out", tmp_path / "out", "--quiet")
    assert outcome.value == 0 and "are left out" not in outcome.out, outcome
