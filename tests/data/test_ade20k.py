from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.data import ADE20K, DataError
from tests.data import trees


def test_masks_lose_one_and_submissions_gain_it(tmp_path: Path) -> None:
    dataset = ADE20K(trees.ade20k(tmp_path), "train")
    assert [dataset.name(i) for i in range(2)] == ["ADE_train_00000001", "ADE_train_00000002"]
    values = np.resize(np.arange(151), trees.SIZE)
    label = dataset.read(0)[1]
    assert (label[values == 0] == 255).all()
    assert np.array_equal(label[values > 0], values[values > 0] - 1)
    assert ADE20K.to_submission(np.array([[0, 149]])).tolist() == [[1, 150]]


def test_the_root_may_be_the_inner_folder_too(tmp_path: Path) -> None:
    assert len(ADE20K(trees.ade20k(tmp_path) / "ADEChallengeData2016", "val")) == 1


def test_an_image_or_a_mask_alone_is_missing_the_other(tmp_path: Path) -> None:
    home = trees.ade20k(tmp_path) / "ADEChallengeData2016"
    (home / "images" / "training" / "ADE_train_00000002.jpg").unlink()
    with pytest.raises(DataError, match=r"images/training/ADE_train_00000002\.jpg: missing"):
        ADE20K(tmp_path, "train")
    trees.write_image(home / "images" / "validation" / "ADE_val_00000009.jpg")
    with pytest.raises(DataError, match=r"annotations/validation/ADE_val_00000009\.png: missing"):
        ADE20K(tmp_path, "val")
