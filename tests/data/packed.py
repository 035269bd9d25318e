"""Packed datasets against what was packed."""

from __future__ import annotations

import numpy as np

from mcibi_fast.data import SegmentationDataset


def assert_same(dataset: SegmentationDataset, source: SegmentationDataset) -> None:
    assert len(dataset) == len(source)
    for i in range(len(source)):
        pixels, label = dataset.read(i)
        expected, expected_label = source.read(i)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected)
        assert label.dtype == np.uint8 and np.array_equal(label, expected_label)
        assert dataset.name(i) == source.name(i)
    assert dataset.classes == list(source.classes)
    assert np.array_equal(dataset.palette, source.palette)
    assert dataset.flip_pairs == source.flip_pairs
    assert (dataset.mean, dataset.std) == (tuple(source.mean), tuple(source.std))
    assert dataset.ignore_index == source.ignore_index
