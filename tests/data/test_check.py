from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import CAMVID_CLASSES, DataError, check


def test_counts_sizes_and_histogram(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    report = check(tree, out, progress=False)
    labels = np.stack([np.array(Image.open(p)) for p in sorted(tree.glob("labels/*/*.png"))])
    assert report.ok
    assert report.pairs == {"train": 3, "val": 1}
    assert report.sizes == {(24, 16): 4}
    assert report.pixels.tolist() == [(labels == c).sum() for c in range(3)]
    assert report.images.tolist() == [4, 4, 4]
    assert report.ignored == (labels == 255).sum()
    text = report.text()
    for piece in ("train 3, val 1", "24x16 (4)", "sky", "tree", "####", "no problems"):
        assert piece in text
    assert len(report.overlays) == 4
    for path in report.overlays:
        assert path.parent == out
        assert Image.open(path).size[0] > 2 * 24


def test_goes_on_past_every_kind_of_problem(tree, tmp_path_factory):
    labels = {"train/a": np.full((16, 24), 200, np.uint8), "val/d": np.zeros((4, 4), np.uint8)}
    for name, label in labels.items():
        Image.fromarray(label).save(tree / "labels" / f"{name}.png")
    (tree / "images/train/b.png").write_bytes(b"")
    for name in ("e", "f", "g"):
        Image.new("RGB", (24, 16)).save(tree / f"images/train/{name}.jpg")
    Image.new("RGB", (24, 16)).save(tree / "labels/train/f.png")
    (tree / "labels/train/g.png").write_bytes(b"no png")
    Image.new("L", (24, 16)).save(tree / "labels/val/spare.png")
    (tree / "images" / "test").mkdir()

    out = tmp_path_factory.mktemp("out")
    report = check(tree, out, progress=False)
    assert not report.ok
    found = "\n".join(report.problems)
    for start in (
        "labels/train/a.png: label 200 with 3 classes",
        "images/train/b.png: empty (0 bytes)",
        "labels/train/e.png: missing mask",
        "labels/train/f.png: a colour mask (RGB)",
        "labels/train/g.png: cannot be decoded",
        "labels/val/d.png: size 4x4 but images/val/d.jpg has 24x16",
    ):
        assert start in found
    assert "images/test: no .jpg" in found
    assert len(report.problems) == 7
    assert report.pairs == {"test": 0, "train": 1, "val": 0}
    assert report.spare == ["labels/val/spare.png"]
    assert len(report.overlays) == 1
    assert "7 problems:" in report.text()


def test_without_a_class_list_the_classes_are_counted(tree):
    (tree / "classes.txt").unlink()
    report = check(tree, progress=False)
    assert report.classes == ["class_0", "class_1", "class_2"]
    assert "no class list" in report.text()
    assert report.overlays == []


def test_nothing_usable(tree):
    for image in tree.glob("images/*/*"):
        image.write_bytes(b"")
    report = check(tree, progress=False)
    assert len(report.problems) == 4
    assert "sizes    none" in report.text()


def test_shows_progress(tree, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    check(tree)
    assert "data check: 100%" in capsys.readouterr().err


def test_not_a_dataset(tmp_path):
    with pytest.raises(DataError, match="no folder 'images'"):
        check(tmp_path, progress=False)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no splits in images/"):
        check(tmp_path, progress=False)


def test_camvid(camvid, tmp_path):
    """On links to a part of it: the whole takes several seconds to decode."""
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
        for file in sorted((camvid / kind / "val").iterdir())[::10]:
            (tmp_path / kind / "val" / file.name).symlink_to(file)
    report = check(tmp_path, tmp_path / "out", classes=CAMVID_CLASSES, progress=False)
    assert report.ok, report.text()
    assert report.pairs == {"val": 11}
    assert report.sizes == {(480, 360): 11}
    share = report.pixels / report.pixels.sum()
    assert share[CAMVID_CLASSES.index("road")] > 0.15
    assert len(report.overlays) == 4
