from __future__ import annotations

import numpy as np
import pytest

from mcibi_fast.viz import distinct_palette, voc_palette
from mcibi_fast.viz.palette import _oklab


@pytest.mark.parametrize("num_classes", [1, 19, 150, 255])
def test_colours_are_distinct_and_stable(num_classes):
    palette = distinct_palette(num_classes)
    assert palette.shape == (num_classes, 3)
    assert palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == num_classes
    assert np.array_equal(palette, distinct_palette(num_classes))
    assert np.array_equal(palette, distinct_palette(255)[:num_classes])


def test_oklab():
    # Red, green and blue as the space's author gives them.
    expected = [[0.628, 0.225, 0.126], [0.866, -0.234, 0.179], [0.452, -0.032, -0.312]]
    np.testing.assert_allclose(_oklab(np.eye(3)), expected, atol=5e-4)


def test_colours_of_few_classes_are_far_apart():
    lab = _oklab(distinct_palette(20) / 255)
    gaps = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert gaps[~np.eye(20, dtype=bool)].min() > 0.1


def test_the_callers_copy_is_its_own():
    distinct_palette(5)[:] = 0
    assert distinct_palette(5).any()


def test_voc_colours():
    # The first entries of the development kit's colour map.
    assert voc_palette(6).tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128],
    ]  # fmt: skip
    assert voc_palette(21)[20].tolist() == [0, 64, 128]
    assert voc_palette(256)[255].tolist() == [224, 224, 192]


def test_too_many():
    with pytest.raises(ValueError, match="num_classes: 1001 colours"):
        distinct_palette(1001)
