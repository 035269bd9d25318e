"""Times of short calls that are captured in CUDA graphs: what they take without the host's share.

Launching a replay takes the host about as long as launching one kernel, whatever Python did when
the call was captured. All candidates of a case are captured, so that ours is compared with what
PyTorch takes in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Candidate, Case, compare, results_of
from benchmarks.machine import host_seconds, interleaved
from benchmarks.results import Row

SHORT = 0.3e-3  # seconds of ours up to which a case is captured; a call takes the host 40 to 280 us
EACH = 0.1  # seconds for timing each candidate
REASON = 200  # characters of an error that are kept


def columns(case: Case, device: str) -> list[Row]:
    """Further columns for the candidates of a case, in their order.

    graph_ms and graph_host_us are the medians of a replay on the device and of launching it. A
    candidate that cannot be captured, or whose replay gives another result, has the reason in
    graph_left_out instead.
    """
    found: list[Row] = []
    replays: dict[int, Callable[[], Any]] = {}
    for i, candidate in enumerate(case.candidates):
        found.append({})
        try:
            replays[i] = captured(case, candidate)
        except Exception as error:
            found[i]["graph_left_out"] = f"{type(error).__name__}: {error}"[:REASON]
    if replays:
        times = interleaved(list(replays.values()), device, EACH * len(replays))
        for (i, replay), seconds in zip(replays.items(), times, strict=True):
            found[i]["graph_ms"] = 1e3 * statistics.median(seconds)
            found[i]["graph_host_us"] = 1e6 * host_seconds(replay)
    return found


def captured(case: Case, candidate: Candidate) -> Callable[[], Any]:
    """Captures a candidate that has run before; returns what launches its replay.

    Raises:
        RuntimeError: it waits for the device, or cannot be captured for another reason.
        Disagreement: the replay's result is not that of the call.
    """
    expected = _warm(candidate)
    graph, results = capture(candidate)
    for result in results:
        result.detach().zero_()  # what it holds already must not pass for what the replay wrote
    graph.replay()
    name = f"{candidate.name} replayed"
    compare(case, name, results, (candidate.name, expected), None)
    return graph.replay


def _warm(candidate: Candidate) -> list[torch.Tensor]:
    """The results of a call on another stream, as capturing needs it. It must not wait for the
    device: that would be an error during the capture, after which PyTorch's allocator goes on as if
    the capture did."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            results = results_of(candidate.run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return results


def capture(candidate: Candidate) -> tuple[Any, list[torch.Tensor]]:
    """The graph of a call, and the tensors that hold its results after a replay."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            results = results_of(candidate.run)
    finally:
        torch.cuda.set_stream(stream)  # which a capture that fails leaves changed
    return graph, results
