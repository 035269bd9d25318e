"""A memory that draws its class representations (Algorithm 1): its noise, and its first rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.nn.class_memory import (
    ClassMemory,
    _check_choice,
    _from_first_rank,
    _of_rank_zero,
)
from mcibi_fast.ops.finite import finite_rows
from mcibi_fast.ops.recompute import once, remembered

Noise = Literal["released", "fresh", "fixed"]


class NoisyMemory(ClassMemory):
    """A memory that draws its representations; see :class:`mcibi_fast.nn.GaussianMemory`."""

    noise: Noise

    def _hold_noise(self, noise: Noise) -> None:
        _check_choice("noise", noise, ("released", "fresh", "fixed"))
        self.noise = noise
        self._hold("noise_state", self._first_noise_state())
        self._hold("fixed_noise_state", torch.tensor([self.seed, 0], device="cpu"))
        table = _released_noise(self.num_classes, self.channels) if noise == "released" else None
        self._hold("noise_table", table)

    def _first_noise_state(self) -> Tensor:
        # Training steps count from 1; step 0 is the draw that evaluation uses.
        return torch.tensor([self.seed, 1], device="cpu")

    @property
    def noise_state(self) -> Tensor:
        """Philox (seed, step) of the next training step, int64; it may be changed in place."""
        return self._held("noise_state", self.memory.device)

    @property
    def fixed_noise_state(self) -> Tensor:
        """Philox (seed, 0), of the draw that evaluation uses."""
        return self._held("fixed_noise_state", self.memory.device)

    @property
    def noise_table(self) -> Tensor | None:
        """The fixed noise (K, Z) in float32 for ``noise="released"``; otherwise None."""
        return self._held("noise_table", self.memory.device)

    def _noise(self) -> Tensor | ops.Philox:
        if self.noise_table is not None:
            return self.noise_table
        fresh = self.noise == "fresh" and self.training
        return ops.Philox(remembered(self.noise_state) if fresh else self.fixed_noise_state)

    @torch.no_grad()
    def _draw_next(self, steps: int | Tensor = 1) -> None:
        """The next training step gets another draw."""
        state = self.noise_state
        state.copy_(once(torch.stack([state[0], state[1] + steps]), state))

    @torch.no_grad()
    def initialize(self, features: Tensor, labels: Tensor) -> None:
        """Sets each class that is not set yet from one random pixel of it (section 3.2).

        Call it on batches of the train split until ``met.all()``; a class that never occurs stays
        as it was. Across ranks, the first rank that sees a class decides; every rank must call it.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        self._check_features(features)
        picked = self._pick_pixels(labels, self.seed + int(self.met.sum()))
        pixels, counts = self._sums(features, picked)
        rows = self._statistics(pixels)
        found = finite_rows(rows.flatten(1), counts > 0)  # else a pixel of a later batch is taken
        self._set(*_from_first_rank(rows, found))

    @torch.no_grad()
    def initialize_from(self, centres: Tensor) -> None:
        """Sets each class that is not set yet from its cluster's centre (section 4.2).

        All ranks take the centres of rank 0.

        Args:
            centres: (K, 1, Z) from :class:`mcibi_fast.nn.clustering.PixelSample`; a class whose
                centre is zero is not changed.
        """
        if centres.shape != (self.num_classes, 1, self.channels):
            raise ValueError(
                f"centres: expected {(self.num_classes, 1, self.channels)}, "
                f"got {tuple(centres.shape)}"
            )
        centres = _of_rank_zero(centres[:, 0].to(self.memory, copy=True))
        rows = self._statistics(centres)
        self._set(rows, finite_rows(rows.flatten(1), centres.any(1) & ~self.met))

    def _sums(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return ops.class_feature_sums(
            features,
            labels,
            self.num_classes,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )

    def _no_sums(self) -> tuple[Tensor, Tensor]:
        """What ``_sums`` returns of no pixels."""
        sums = self.memory.new_zeros(self.num_classes, self.channels)
        return sums, torch.zeros_like(sums[:, 0], dtype=torch.int64)

    def _statistics(self, vectors: Tensor) -> Tensor:
        """The rows (K, ...) of classes of which one vector each is known, (K, Z)."""
        raise NotImplementedError

    def _set(self, rows: Tensor, found: Tensor) -> None:
        found = found.view(-1, *[1] * (rows.ndim - 1))
        self.memory.copy_(torch.where(found, rows, self.memory))

    def _read(self) -> Tensor:
        """The memory; while training, which updates it, a copy."""
        return remembered(self.memory) if self.training else self.memory


def _released_noise(num_classes: int, channels: int) -> Tensor:
    """The released code's unit table (K, Z): class k from a CPU generator seeded with k.

    Its bits are those of PyTorch's AVX2 and AVX-512 path; on other CPUs entries differ by up to
    2e-6. A prefix in Z repeats only for multiples of 16.
    """
    rows = [
        torch.randn(
            channels,
            generator=torch.Generator("cpu").manual_seed(k),
            dtype=torch.float32,
            device="cpu",
        )
        for k in range(num_classes)
    ]
    return torch.stack(rows)
