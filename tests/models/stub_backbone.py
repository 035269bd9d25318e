"""A backbone that is quick to trace, in place of timm's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.models import creation, registry

# Every test of frameworks runs on these; `test_peers.py` runs on the peers, all others.
FRAMEWORKS = ("fcn", "pspnet", "deeplabv3", "upernet", "isnet")
PEERS = tuple(name for name in models.frameworks() if name not in FRAMEWORKS)
# `test_video_methods.py` runs on the methods for videos.
NAMES = tuple(
    name
    for name in models.names()
    if name.split("_")[0] in FRAMEWORKS and registry.parse(name).method is None
)


class Stub(nn.Module):
    """Images -> maps of stride 4, 8, 8 and 8."""

    channels = (8, 8, 8, 8)
    reductions = (4, 8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 7, 4), (8, 3, 2), (8, 3, 1), (8, 3, 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, 8, kernel, stride, kernel // 2)
            for channels, kernel, stride in sizes
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for convolution in self.convolutions:
            maps.append(convolution(maps[-1]).tanh())
        return maps[1:]


@contextmanager
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every framework gets this backbone, and the same weights in every run."""
    monkeypatch.setattr(creation, "create_backbone", lambda *_, **__: Stub())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
