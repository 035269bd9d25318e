"""LIP and CIHP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.data import CIHP, LIP, DataError
from tests.data import trees


@pytest.mark.parametrize("cls", [LIP, CIHP])
def test_flip_pairs_are_left_and_right(cls: type[LIP]) -> None:
    assert cls.flip_pairs == ((14, 15), (16, 17), (18, 19))
    for left, right in cls.flip_pairs:
        assert cls.classes[left].startswith("left ")
        assert cls.classes[right] == cls.classes[left].replace("left", "right")


def test_the_two_differ_in_class_10_alone() -> None:
    differ = [i for i, (a, b) in enumerate(zip(LIP.classes, CIHP.classes, strict=True)) if a != b]
    assert differ == [10]
    assert (LIP.classes[10], CIHP.classes[10]) == ("jumpsuits", "torso skin")


def test_masks_are_classes(tmp_path: Path) -> None:
    dataset = LIP(trees.lip(tmp_path), "train")
    assert [dataset.name(i) for i in range(2)] == ["77_471474", "9_1"], "in the list's order"
    assert np.array_equal(dataset.read(0)[1], np.resize(np.arange(20), trees.SIZE))


def test_cihp_names_have_seven_digits_whatever_the_list_says(tmp_path: Path) -> None:
    trees.cihp(tmp_path)
    assert (tmp_path / "Training" / "train_id.txt").read_text() == "6\n"
    for split, name in (("train", "0000006"), ("val", "0000001")):
        assert CIHP(tmp_path, split).name(0) == name


def test_a_missing_list(tmp_path: Path) -> None:
    trees.lip(tmp_path)
    (tmp_path / "val_id.txt").unlink()
    with pytest.raises(DataError, match=r"no val_id\.txt in it; expected \{train,val\}_images"):
        LIP(tmp_path, "val")
    LIP(tmp_path, "train")
