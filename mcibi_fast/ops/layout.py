"""The memory format of what the kernels write."""

from __future__ import annotations

import torch
from torch import Tensor


def layout(t: Tensor) -> torch.memory_format:
    """That of the results for maps ``t``: channels_last unless these are also contiguous."""
    if t.is_contiguous() or not t.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
