"""The counter-based noise of the paper form: nothing global is seeded or drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Philox:
    """Noise for ``gaussian_aggregate`` drawn inside the kernel by Philox4x32-10.

    The normal number of class k and channel z comes from key ``seed`` and counter
    ``(z // 4, k, step, 0)``, so it depends on nothing else: not on the device, the number of
    threads, or what was drawn before. Backends agree to 2e-6.

    Args:
        state: int64 tensor of two elements (seed, step) on the op's device, the same on every
            rank. It is read when the op runs, so it can be advanced in place between steps.

    Raises:
        ValueError: the state has another shape or dtype.
    """

    state: Tensor

    def __post_init__(self) -> None:
        if self.state.dtype != torch.int64 or tuple(self.state.shape) != (2,):
            raise ValueError(
                "state: expected an int64 tensor of 2 elements (seed, step), got "
                f"{self.state.dtype} of shape {tuple(self.state.shape)}"
            )
