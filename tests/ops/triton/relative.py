"""The relative rule: an error of at most twice PyTorch's in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def error(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where the truth is zero."""
    size = float(truth.norm())
    return float((result.double() - truth).norm()) / (size or 1.0)


def assert_at_most_twice(
    names: Sequence[str],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    truth: Sequence[Tensor],
) -> None:
    """Of each result, but for one unit of rounding where PyTorch happens to be exact.

    Args:
        names: of the results.
        ours: the kernels' results.
        theirs: PyTorch's in the same dtype; of a statistic in another one, the unit is its own.
        truth: in float64.
    """
    for name, a, b, exact in zip(names, ours, theirs, truth, strict=True):
        assert a.shape == exact.shape and a.is_contiguous(), name
        unit = torch.finfo(a.dtype).eps / 2
        mine, bar = error(a, exact), error(b, exact)
        assert mine <= 2 * bar + unit, f"{name}: error {mine:.2e}, PyTorch's {bar:.2e}"
