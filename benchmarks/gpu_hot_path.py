"""The stage of `benchmarks.gpu_check` for what runs in every step: no waiting, CUDA graphs."""

from __future__ import annotations

import torch

from benchmarks.gpu_accuracy import Report
from tests.ops.table import SMALL, Case, attention_case


def hot_path(device: str, seconds: float) -> Report:
    """Checks that no op waits for the device and that each can be captured in a CUDA graph."""
    if device == "cpu":
        return {"skipped": "needs a GPU"}
    verdicts, failed = {}, 0
    for case in [*(c for c in SMALL if c.note.endswith("-cuda")), split_keys()]:
        try:
            verdicts[str(case)] = _captured(case)
        except Exception as error:
            verdicts[str(case)] = f"{type(error).__name__}: {error}"[:1000]
            failed += 1
    return {"failed": failed, **verdicts}


def split_keys() -> Case:
    """Attention of so few queries that a GPU's programs divide the keys."""
    return attention_case(64, 4096, 16, 16, "split-keys").on("cuda")


def _captured(case: Case) -> str:
    args = case.args(torch.bfloat16)
    expected = case.call(*args)  # this also warms up: modules are loaded, flags allocated
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.call(*args)
    captured.fill_(0)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
    return "no sync, captured, equal bits"
