"""Memory update, Eqs. 6-9: the specification, in the order of the paper's text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.ops.finite import finite_rows


def class_feature_sums(
    features: Tensor, labels: Tensor, num_classes: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Sum over the pixels of each class of the upsampled features, and the number of pixels.

    Args:
        features: R, (B, Z, h, w).
        labels: GT, (B, H, W) int64; every value outside [0, num_classes) is ignored.
        num_classes: K.
        align_corners: of the bilinear upsampling.

    Returns:
        sums (K, Z) in float32, float64 for float64 features; counts (K,) int64.
    """
    R, GT = _pixels(features, labels, align_corners)
    members = [R[GT == k] for k in range(num_classes)]  # noqa: SIM300 - R_{c_k} of Eq. 7
    sums = torch.stack([rows.sum(0) for rows in members])
    counts = torch.tensor([len(rows) for rows in members], device=labels.device)
    return sums, counts


def class_feature_sums_by_index(
    features: Tensor, labels: Tensor, num_classes: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """``class_feature_sums`` without sizes that depend on the labels, which vmap does not allow."""
    R, GT = _pixels(features, labels, align_corners)
    ignored = (GT < 0) | (GT >= num_classes)  # noqa: SIM300 - of GT
    rows = GT.masked_fill(ignored, num_classes)  # the last row
    sums = R.new_zeros(num_classes + 1, R.shape[1]).index_add(0, rows, R)
    counts = GT.new_zeros(num_classes + 1).index_add(0, rows, torch.ones_like(rows))
    return sums[:num_classes], counts[:num_classes]


def _pixels(features: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The upsampled features R as rows (B H W, Z), and their labels GT (B H W,)."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    upsampled = F.interpolate(
        features.to(dtype), size=labels.shape[-2:], mode="bilinear", align_corners=align_corners
    )
    return upsampled.movedim(1, -1).flatten(0, 2), labels.flatten()


def moving_average(
    memory: Tensor, sums: Tensor, counts: Tensor, momentum: float, unbiased: bool
) -> Tensor:
    """Eqs. 8, 9 and 6: from the sums of each class to the next memory.

    Args:
        memory: M, (K, 2); column 0 the mean, column 1 the standard deviation.
        sums, counts: what ``class_feature_sums`` returns.
        momentum: m.
        unbiased: divide the variance by Z - 1 (released form) instead of Z (paper).

    Returns:
        The next memory (K, 2). Classes without a pixel keep their row, and so do those whose row
        would not be finite; the latter are counted (see :func:`kept_rows`).
    """

    def moved(mean_vector: Tensor) -> Tensor:
        mean = mean_vector.mean(1)  # Eq. 9
        std = mean_vector.std(1, correction=int(unbiased))
        new = torch.stack([mean, std], dim=1)
        return ((1 - momentum) * memory + momentum * new).to(memory.dtype)  # Eq. 6

    # The squares of large features overflow in float32.
    mean_vector = sums.double() / counts.clamp(min=1).unsqueeze(1)  # Eq. 8, (K, Z)
    moves = finite_rows(moved(mean_vector), counts > 0).unsqueeze(1)
    # A row that is kept must not send a gradient through the root of a zero or infinite variance.
    mean_vector = torch.where(moves, mean_vector, _ramp_like(mean_vector))
    return torch.where(moves, moved(mean_vector), memory)


def _ramp_like(rows: Tensor) -> Tensor:
    """Rows 0, 1, 2, ...: any constant rows with a variance would do."""
    return torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device).expand_as(rows)
