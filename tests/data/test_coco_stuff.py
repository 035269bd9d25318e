from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.data import COCOStuff, COCOStuff171, DataError
from tests.data import trees

ABSENT = {
    12: "street sign", 26: "hat", 29: "shoe", 30: "eye glasses", 45: "plate", 66: "mirror",
    68: "window", 69: "desk", 71: "door", 83: "blender", 91: "hair brush",
}  # fmt: skip


def test_the_released_form_keeps_all_182_ids(tmp_path: Path) -> None:
    dataset = COCOStuff(trees.coco_stuff(tmp_path), "train")
    values = np.resize(np.arange(183), trees.SIZE)
    label = dataset.read(0)[1]
    assert (label[values == 0] == 255).all()
    assert np.array_equal(label[values > 0], values[values > 0] - 1)
    assert {k: COCOStuff.classes[k - 1] for k in ABSENT} == ABSENT


def test_the_compact_form_drops_the_11_that_never_occur(tmp_path: Path) -> None:
    present = [k for k in range(1, 183) if k not in ABSENT]
    dataset = COCOStuff171(trees.coco_stuff(tmp_path, values=[0, *present]), "train")
    values = np.resize(np.array([0, *present]), trees.SIZE)
    label = dataset.read(0)[1]
    assert [COCOStuff171.classes[c] for c in label[0, 1:13]] == COCOStuff.classes[:11] + [
        "stop sign"
    ]
    names, full = np.array(COCOStuff171.classes), np.array(COCOStuff.classes)
    assert np.array_equal(names[label[values > 0]], full[values[values > 0] - 1])
    assert (label[values == 0] == 255).all()
    assert not set(ABSENT.values()) & set(COCOStuff171.classes)
    trees.coco_stuff(tmp_path, values=[12])
    with pytest.raises(DataError, match="value 12; the masks of COCO-Stuff"):
        COCOStuff171(tmp_path, "train").read(0)


@pytest.mark.parametrize("cls", [COCOStuff, COCOStuff171])
def test_files_of_version_1_0_are_refused(tmp_path: Path, cls: type[COCOStuff]) -> None:
    """Every one of its values is a value of v1.1, too, of another class."""
    dataset = cls(trees.coco_stuff(tmp_path, values=[1, 2, 172], names=172), "train")
    with pytest.raises(DataError) as error:
        dataset.read(0)
    assert str(error.value) == (
        "annotations/COCO_train2014_000000000077.mat: of COCO-Stuff 10k v1.0 (172 names, 1 is "
        "unlabelled), whose values mean other classes; use cocostuff-10k-v1.1.zip"
    )


def test_a_mat_file_without_a_label_map(tmp_path: Path) -> None:
    trees.coco_stuff(tmp_path)
    trees.write_mat(tmp_path / "annotations" / "COCO_train2014_000000000077.mat", other=[1])
    with pytest.raises(DataError, match=r"0077\.mat: no S in it"):
        COCOStuff(tmp_path, "train").read(0)
