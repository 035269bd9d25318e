"""A memory with one Gaussian per class and channel, which the paper's outlook asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.nn.attention import mix_rows
from mcibi_fast.nn.class_memory import (
    Init,
    MomentumSchedule,
    _pooled,
)
from mcibi_fast.nn.noise import Noise, NoisyMemory
from mcibi_fast.nn.rows import standard_rows
from mcibi_fast.ops.finite import finite_rows
from mcibi_fast.ops.recompute import once


class DiagonalMemory(NoisyMemory):
    """The distribution of every class in each channel: vectors of means and deviations.

    A :class:`mcibi_fast.nn.GaussianMemory` keeps two numbers per class, the mean and the deviation
    over the channels of the class's mean pixel (Eqs. 8 and 9): what tells the channels of a class
    apart is lost. This memory keeps the mean pixel itself and the deviation of the class's pixels
    from it, and draws mean + deviation * noise in each channel. It is ours, not the paper's.

    The only state-dict key is ``memory`` (K, 2, Z): float32, or float64 after ``.double()``.

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        momentum, momentum_schedule, fixed: see :class:`mcibi_fast.nn.GaussianMemory`.
        noise: "released", "fresh" or "fixed", see there.
        init: "standard": mean 0, deviation 1. "pixel" and "cluster": the mean is that of a pixel or
            of a cluster's centre, and the deviation 0.
        seed: seed of the Philox noise and of the pixels that ``initialize`` picks.
        ignore_index: label that belongs to no class.
        align_corners: whether features are upsampled to the labels' size with aligned corners.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        momentum: float = MOMENTUM,
        momentum_schedule: MomentumSchedule = "fixed",
        fixed: bool = False,
        noise: Noise = "released",
        init: Init = "standard",
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> None:
        super().__init__(
            num_classes,
            channels,
            momentum=momentum,
            momentum_schedule=momentum_schedule,
            fixed=fixed,
            init=init,
            seed=seed,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        self.register_buffer("memory", torch.zeros(num_classes, 2, channels))
        self.memory[:, 1] = 1.0
        self._hold_noise(noise)

    @property
    def met(self) -> Tensor:
        """(K,): which classes have been set; all of them with ``init="standard"``."""
        if self.init == "standard":
            return self.memory.new_ones(self.num_classes, dtype=torch.bool)
        mean, std = self.memory.unbind(1)
        return ((mean != 0) | (std != 1)).any(1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets everything, as after ``__init__``; also for a memory without values yet."""
        self.memory[:, 0], self.memory[:, 1] = 0.0, 1.0
        self._hold("noise_state", self._first_noise_state())

    def representations(self) -> Tensor:
        """C_dl (K, Z): mean + deviation * noise, one draw per class."""
        mean, std = self._read().unbind(1)
        unit = standard_rows(mean)
        return mean + std * ops.gaussian_table(unit, self.channels, noise=self._noise())

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12) from the logits of W: (B, K, h, w) -> (B, Z, h, w).

        With ``hard``, W is one-hot at the largest logit (the first one on ties).
        """
        return mix_rows(weight_logits, self.representations(), hard=hard)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Moves the classes present in ``labels`` towards their means and deviations now.

        A context that is called with labels needs no call of it; in its steps a call takes the
        place of the automatic update.

        Features are not upsampled: each counts for a class by the weight with which the bilinear
        upsampling (Eq. 7) gives it to the class's pixels. The mean is therefore exactly that of the
        upsampled features; the deviation is that of the features themselves. All ranks of the
        default process group pool their batches. A class whose statistics are not finite keeps its
        row and is counted, see :func:`mcibi_fast.ops.kept_rows`. Allocates one copy of the
        features, their squares, besides what ``ops.class_feature_sums`` allocates.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        super().update(features, labels)

    def _collect(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        if self.fixed:
            return []
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        sums, counts = self._sums(features, labels)
        squares, _ = self._sums(features.square(), labels)
        return [sums, squares, counts]

    def _nothing(self) -> list[Tensor]:
        sums, counts = self._no_sums()
        return [] if self.fixed else [sums, sums.clone(), counts]

    def _learn(self, statistics: Sequence[Tensor], steps: int | Tensor) -> None:
        if statistics:
            sums, squares, counts = _pooled(statistics)
            pixels = counts.clamp(min=1)[:, None]
            mean = sums / pixels
            std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
            target = torch.stack([mean, std], dim=1).to(self.memory.dtype)
            moved = self.memory + self.momentum * (target - self.memory)
            moves = finite_rows(moved.flatten(1), counts > 0)[:, None, None]
            self.memory.copy_(once(torch.where(moves, moved, self.memory), self.memory))
        self._draw_next(steps)

    def _statistics(self, vectors: Tensor) -> Tensor:
        """(K, 2, Z): the vectors as means, and deviations of 0."""
        return torch.stack([vectors, torch.zeros_like(vectors)], dim=1).to(self.memory.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, {self.channels}, momentum={self.momentum}, "
            f"noise={self.noise!r}, init={self.init!r}, fixed={self.fixed}"
        )
