"""What the table of ops does not show of the attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mcibi_fast
from mcibi_fast import ops
from mcibi_fast.ops.confidence_attention import _sdpa_backward
from mcibi_fast.ops.confidence_attention.sdpa import sdpa


class Recorder(TorchDispatchMode):
    """Notes which operators ran, and the largest result of any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return results


@pytest.mark.parametrize("layout", ["rows", "maps", "two widths"])
def test_scores_are_never_materialised_on_the_cpu(layout: str, generator: torch.Generator) -> None:
    queries, keys, width = 96, 128, 16
    widths = (width // 2, width // 2, width) if layout == "two widths" else (width,) * 3
    q, k, v = (
        torch.randn(1, n, d, generator=generator)
        for n, d in zip((queries, keys, keys), widths, strict=True)
    )
    if layout == "maps":  # (B, D, N) in memory
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with Recorder() as eager:
        ops.confidence_attention(q, k, v).sum().backward()
    with Recorder() as traced:  # what a traced graph runs: the two operators' kernels
        out, lse = sdpa(q, k, v, 0.25)
        _sdpa_backward(torch.ones_like(out), q, k, v, out, lse, 0.25)
    for recorder in (eager, traced):
        assert recorder.largest < queries * keys, recorder.names
        assert any("flash_attention_for_cpu" in name for name in recorder.names)
    with mcibi_fast.backend("reference"), Recorder() as reference:
        ops.confidence_attention(q, k, v)
    assert reference.largest == queries * keys
