"""Labels are compared as numbers, whether or not their dtype has the class or the ignore index."""

from __future__ import annotations

import torch
from torch import Tensor

from mcibi_fast.nn import GaussianMemory, PixelLoss
from mcibi_fast.nn.clustering import PixelSample

K = 301  # 300 is 44 in uint8


def labels_and_features(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.full((1, 4, 4), 44, dtype=torch.uint8)
    return labels, torch.randn(1, 8, 4, 4, generator=generator)


def test_initialisation_meets_the_class_that_is_there(generator: torch.Generator) -> None:
    labels, features = labels_and_features(generator)
    memory = GaussianMemory(K, 8, init="pixel", ignore_index=300)
    memory.initialize(features, labels)
    assert memory.met.nonzero().tolist() == [[44]]


def test_a_sample_holds_pixels_of_their_class_alone(generator: torch.Generator) -> None:
    labels, features = labels_and_features(generator)
    sample = PixelSample(K, 8, ignore_index=-1)
    sample.add(features, labels)
    assert [k for k, count in enumerate(sample.counts) if count] == [44]


def test_losses_leave_out_the_ignore_index_alone(generator: torch.Generator) -> None:
    labels, _ = labels_and_features(generator)
    logits = torch.randn(1, 45, 4, 4, generator=generator)
    for options in ({}, {"class_weights": [1.0] * 45}, {"ohem_threshold": 1.0}):
        loss = PixelLoss(**options)
        assert loss.total_weight(labels, ignore_index=300) == labels.numel()
        expected = loss(logits, labels.long(), ignore_index=300)
        assert expected and torch.equal(loss(logits, labels, ignore_index=300), expected)
