"""Expectation-maximisation attention: pixels are rebuilt from a few bases."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.rows import rows, to_map
from mcibi_fast.nn.within_image.attended import AttendedContext
from mcibi_fast.ops.recompute import once, remembered

BASES_MOMENTUM = 0.1  # of the moving average of the bases, as in the released code


class EMANet(AttendedContext):
    """Expectation-maximisation attention network (arXiv 1907.13426): :class:`AttendedContext` with
    :class:`EMABlock`.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the block and of the result.
        bases, iterations, momentum: see :class:`EMABlock`.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bases: int = 64,
        iterations: int = 3,
        momentum: float = BASES_MOMENTUM,
    ) -> None:
        block = EMABlock(out_channels, bases=bases, iterations=iterations, momentum=momentum)
        super().__init__(in_channels, out_channels, block)


class EMABlock(nn.Module):
    """relu(x + F(relu(z mu^T))), where z and mu are found by expectation maximisation on G(x).

    Starting from the bases that are kept, every iteration computes how much each of the bases is
    responsible for each pixel, z = softmax(G(x) mu) over the bases, and then new bases mu, the
    means of the pixels weighted by z, of length 1. G is a 1x1 convolution and F another with batch
    norm. There are no gradients through z and mu, so G keeps its initial, random weights.

    In training the kept bases move towards the mean over the batch (of all processes) of the bases
    that were found.

    Args:
        channels: C, channels of input and result.
        bases: k, the number of bases.
        iterations: of expectation maximisation.
        momentum: weight of the bases that were found.

    Attributes:
        bases: the kept bases (1, C, k).

    Shape: (B, channels, h, w) -> the same.
    """

    bases: Tensor

    def __init__(
        self,
        channels: int,
        *,
        bases: int = 64,
        iterations: int = 3,
        momentum: float = BASES_MOMENTUM,
    ) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {iterations}")
        self.project = nn.Conv2d(channels, channels, 1).requires_grad_(False)  # G
        self.output = nn.Sequential(  # F
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.register_buffer("bases", torch.empty(1, channels, bases))
        self.iterations = iterations
        self.momentum = momentum
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``: bases of length 1, at random."""
        nn.init.normal_(self.bases)
        with torch.no_grad():
            self.bases.copy_(F.normalize(self.bases, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        return (features + self.output(self._rebuilt(features).relu())).relu()

    @torch.no_grad()
    def _rebuilt(self, features: Tensor) -> Tensor:
        """z mu^T (B, C, h, w); in training the kept bases are updated."""
        pixels = rows(self.project(features))  # (B, N, C)
        start = remembered(self.bases) if self.training else self.bases
        bases = start.to(pixels.dtype).expand(pixels.shape[0], -1, -1)
        for _ in range(self.iterations):
            z = (pixels @ bases).softmax(dim=2)  # (B, N, k)
            bases = F.normalize(pixels.mT @ F.normalize(z, p=1, dim=1).to(pixels.dtype), dim=1)
        if self.training:
            self._update(start, bases.to(start.dtype))
        return to_map(z.to(pixels.dtype) @ bases.to(pixels.dtype).mT, features)

    def _update(self, start: Tensor, found: Tensor) -> None:
        mean = found.mean(dim=0, keepdim=True)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean.div_(dist.get_world_size()))
        new = (1 - self.momentum) * start + self.momentum * F.normalize(mean, dim=1)
        self.bases.copy_(once(new, self.bases))
