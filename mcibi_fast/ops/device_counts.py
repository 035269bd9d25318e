"""Small counters in a device's memory, which kernels add to and the host reads later."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(counts: dict[torch.device, Tensor], device: torch.device, size: int, what: str) -> Tensor:
    """The device's counter in ``counts``, int64 (size,), which is made when it is first asked for.

    Args:
        counts: the counters of all devices.
        device: where the kernel runs.
        size: numbers in the counter.
        what: what it counts, for the error.

    Raises:
        RuntimeError: it would be made while a CUDA graph is captured. Its zeros would be part of
            the graph, so that each replay would forget what the replays before had counted.
    """
    if device not in counts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{what}: the first call on {device} is inside the capture of a CUDA graph, where "
                "its counter cannot be made; call it once before the capture"
            )
        with torch.inference_mode(False):  # it is read and cleared outside, too
            counts[device] = torch.zeros(size, dtype=torch.int64, device=device)
    return counts[device]
