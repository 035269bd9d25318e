from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.data import Cityscapes, DataError
from tests.data import trees

LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip


def test_label_ids_become_classes_and_go_back(tmp_path: Path) -> None:
    dataset = Cityscapes(trees.cityscapes(tmp_path), "train")
    assert Cityscapes.classes == list(LABEL_IDS)
    label, ids = dataset.read(0)[1], np.resize(np.arange(34), trees.SIZE)
    for index, value in enumerate(LABEL_IDS.values()):
        assert (label[ids == value] == index).all()
    assert (label[~np.isin(ids, list(LABEL_IDS.values()))] == 255).all()
    assert Cityscapes.to_submission(np.arange(19)[None]).tolist() == [list(LABEL_IDS.values())]


def test_names_and_splits(tmp_path: Path) -> None:
    trees.cityscapes(tmp_path)
    both = Cityscapes(tmp_path, "trainval")
    assert [both.name(i) for i in range(3)] == [
        "aachen_000000_000019", "bochum_000000_000313", "lindau_000000_000019",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no leftImg8bit/test in it"):
        Cityscapes(tmp_path, "test")


def test_two_zip_files_beside_another(tmp_path: Path) -> None:
    """As downloaded: trainextra also holds leftImg8bit, and comes first in the alphabet."""
    root, downloads = trees.cityscapes(tmp_path / "tree"), tmp_path / "downloads"
    downloads.mkdir()
    expected = [Cityscapes(root, "train").read(i) for i in range(2)]
    for kind in ("leftImg8bit", "gtFine"):
        trees.pack(root / kind, downloads / f"{kind}_trainvaltest.zip", within=f"{kind}/")
    trees.write_image(tmp_path / "x" / "train_extra" / "ulm" / "ulm_000000_000001_leftImg8bit.png")
    trees.pack(tmp_path / "x", downloads / "leftImg8bit_trainextra.zip", within="leftImg8bit/")
    shutil.rmtree(root)
    dataset = Cityscapes(downloads, "train")
    for i in range(2):
        for a, b in zip(dataset.read(i), expected[i], strict=True):
            assert np.array_equal(a, b)
    with pytest.raises(DataError, match="no gtFine/train in it"):
        Cityscapes(downloads / "leftImg8bit_trainvaltest.zip", "train")


def test_an_error_names_the_zip_file(tmp_path: Path) -> None:
    root = trees.cityscapes(tmp_path / "tree")
    path = next(root.rglob("aachen*_labelIds.png"))
    trees.write_mask(path, [7, 200])
    archive = trees.pack(root, tmp_path / "all.zip")
    with pytest.raises(DataError) as error:
        Cityscapes(archive, "train").read(0)
    assert str(error.value) == (
        "all.zip/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png: value 200; the "
        "masks of Cityscapes hold 0..33, 255; unpack it again"
    )
