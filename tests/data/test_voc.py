from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.data import VOC, DataError
from tests.data import trees


def names(dataset: VOC) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def test_trainaug_is_both_train_sets_and_sbds_val_without_vocs_val(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    assert names(VOC(tmp_path, "trainaug")) == ["a", "b", "s", "t"]
    assert names(VOC(tmp_path, "train")) == ["a", "b"]
    assert names(VOC(tmp_path, "val")) == ["v"]


def test_vocs_own_masks_come_before_sbds(tmp_path: Path) -> None:
    dataset = VOC(trees.voc(tmp_path), "trainaug")
    own = np.resize(np.array([*range(21), 255]), trees.SIZE)
    boundaries = np.resize(np.arange(21)[::-1], trees.SIZE)
    for i, expected in enumerate([own, own, boundaries, boundaries]):
        assert np.array_equal(dataset.read(i)[1], expected)


def test_the_masks_and_list_that_others_made(tmp_path: Path) -> None:
    """SegmentationClassAug and trainaug.txt in place of SBD; images of val are still left out."""
    trees.voc(tmp_path)
    home = tmp_path / "VOC2012"
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    with pytest.raises(DataError, match=r"ImageSets/Segmentation/trainaug\.txt: missing"):
        VOC(tmp_path, "trainaug")
    trees.write_list(home / "ImageSets" / "Segmentation" / "trainaug.txt", ["t", "a", "v"])
    with pytest.raises(DataError, match=r"SegmentationClass/t\.png: missing; unpack VOC 2012"):
        VOC(tmp_path, "trainaug")
    expected = trees.write_mask(home / "SegmentationClassAug" / "t.png", [3, 20])
    for root in (tmp_path, home):
        dataset = VOC(root, "trainaug")
        assert names(dataset) == ["a", "t"]
        assert np.array_equal(dataset.read(1)[1], expected)


def test_voc_2010_beside_it_is_left_alone(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    shutil.copytree(tmp_path / "VOC2012", tmp_path / "VOC2010")
    dataset = VOC(tmp_path, "train")
    assert all(path.startswith("VOC2012/") for item in dataset.items for path in item[1:])


def test_a_mat_file_of_another_kind(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    path = tmp_path / "benchmark_RELEASE" / "dataset" / "cls" / "s.mat"
    trees.write_mat(path, GTcls={"Boundaries": [1]})
    with pytest.raises(DataError, match=r"cls/s\.mat: no GTcls\.Segmentation in it"):
        VOC(tmp_path, "trainaug").read(2)
    trees.write_mat(path, GTinst={"Segmentation": [1]})
    with pytest.raises(DataError, match=r"cls/s\.mat: no GTcls in it"):
        VOC(tmp_path, "trainaug").read(2)


def test_colours_are_vocs() -> None:
    colour = dict(zip(VOC.classes, VOC.palette.tolist(), strict=True))
    assert colour["background"] == [0, 0, 0]
    assert colour["aeroplane"] == [128, 0, 0]
    assert colour["person"] == [192, 128, 128]
    assert colour["tvmonitor"] == [0, 64, 128]
