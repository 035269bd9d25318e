"""The `loss` option reaches every term of every framework."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcibi_fast import models
from mcibi_fast.nn import PixelLoss
from tests.models.stub_backbone import NAMES


class Constant(PixelLoss):
    def forward(self, logits: Tensor, labels: Tensor, **_options: object) -> Tensor:
        return torch.full((), 7.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_term_is_of_the_given_loss(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = models.create(
            name, 3, backbone="test_resnet", feats_channels=8, loss=Constant()
        ).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    labels = torch.randint(3, (2, 32, 32), generator=generator)
    losses = model(images, labels).losses
    weights = {"loss_cls": 1.0, "loss_pr": 0.4, "loss_cwi": 1.0, "loss_aux": 0.4}
    expected = {name: 7 * weights[name] for name in losses}
    assert len(expected) >= 2
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected)
