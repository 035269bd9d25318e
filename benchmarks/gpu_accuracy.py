"""Compares every op, dtype and layout on a GPU with float64 at the paper's sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mcibi_fast
from benchmarks.cases import NEAR_TIES
from mcibi_fast.ops.dispatch import _ops
from tests.ops import table
from tests.ops.test_all_ops import cotangent_for, error, with_gradient, yardstick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")
Report = dict[str, Any]


def _paper_cases() -> list[Callable[[], table.Case]]:
    """C = 512, T = 256; K of Cityscapes and ADE20K; 97x97 is an odd size of the protocol."""
    size, odd = (512, 512), (769, 769)
    return [
        partial(table.cross_entropy_case, (2, 150, 64, 64), size, "cross-entropy-150"),
        partial(
            *(table.cross_entropy_case, (2, 19, 97, 97), odd, "cross-entropy-19-odd"),
            weighted=True,
            label_smoothing=0.1,
        ),
        partial(table.class_rank_case, 2, 4096, 19, "class-rank-19"),
        partial(table.class_rank_case, 2, 4096, 60, "class-rank-60"),
        partial(table.class_rank_case, 1, 97 * 97, 150, "class-rank-150-odd"),
        partial(table.class_rank_case, 1, 97 * 97, 150, "class-rank-150-hard", hard=True),
        partial(table.argmax_case, (2, 150, 64, 64), size, "argmax-150"),
        partial(table.argmax_case, (1, 19, 97, 97), odd, "argmax-19-odd"),
        partial(table.confusion_case, (2, 150, 64, 64), size, "confusion-150"),
        partial(table.sums_case, (2, 512, 64, 64), size, 150, "sums-150"),
        partial(table.update_case, (2, 512, 64, 64), size, 19, "update-19"),
        partial(table.update_case, (1, 512, 97, 97), odd, 150, "update-150-odd"),
        partial(table.aggregate_case, (2, 19, 64, 64), 512, "aggregate-19"),
        partial(table.aggregate_case, (1, 150, 97, 97), 512, "aggregate-150-odd", philox=True),
        partial(table.attention_case, 4096, 4096, 256, 256, "attention-256"),
        partial(table.attention_case, 1000, 1500, 512, 512, "attention-512"),
    ]


def paper_ops() -> set[str]:
    """The ops that have cases."""
    return {_op_of(make) for make in _paper_cases()}


def cases_of(op: str, device: str) -> list[table.Case]:
    """The cases of an op at the paper's sizes; on the CPU small ones.

    Raises:
        ValueError: there are none.
    """
    if op not in paper_ops():
        raise ValueError(f"no case of {op!r}")
    if device == "cpu":
        return [c for c in table.CASES if c.name == op and c.note.startswith("prime")]
    made = (make() for make in _paper_cases() if _op_of(make) == op)
    return [case.on(device) for case in made]


def _op_of(make: Any) -> str:
    names = {
        table.cross_entropy_case: "upsample_cross_entropy",
        table.class_rank_case: "class_rank_attention",
        table.argmax_case: "upsample_argmax",
        table.confusion_case: "upsample_confusion",
        table.sums_case: "class_feature_sums",
        table.update_case: "memory_update",
        table.aggregate_case: "gaussian_aggregate",
        table.attention_case: "confidence_attention",
    }
    return names[make.func]


def backends(case: table.Case, dtype: torch.dtype) -> list[str]:
    """The backends that can run the case in this dtype (a Triton kernel has no float64)."""
    op = _ops[case.name]
    args = op.prepare(*case.args(dtype), **case.options)
    return [k.backend for k in op.kernels if k.backend != "reference" and not k.why_not(*args)]


def compare(op: str, device: str, seconds: float) -> Iterator[Report]:
    """Relative errors compared with float64, beside those of PyTorch in the same dtype.

    Yields:
        The report so far, after each comparison. A comparison that fails does not stop the others.
    """
    end = time.monotonic() + seconds
    rows: list[Report] = []
    left_out = 0
    for case in cases_of(op, device):
        cotangent = cotangent_for(case, case.args()) if case.differentiable else None
        with mcibi_fast.backend("reference"):
            truth = _results(case, case.args(), cotangent)
        for dtype in DTYPES:
            for backend in backends(case, dtype):
                bars: list[float] | None = None
                for layout in LAYOUTS:
                    if time.monotonic() > end:
                        left_out += 1
                        continue
                    what = {"case": str(case), "backend": backend, "layout": layout}
                    what["dtype"] = str(dtype).removeprefix("torch.")
                    try:
                        bars = (
                            _bars(case, dtype, backend, truth, cotangent) if bars is None else bars
                        )
                        rows.append(
                            what
                            | _compared(
                                case.args(dtype, layout), case, backend, truth, cotangent, bars
                            )
                        )
                    except Exception as problem:
                        rows.append(what | {"ok": False, "error": f"{problem}"[:1000]})
                        if device == "cuda":
                            torch.cuda.synchronize()  # after a wrong access nothing else can run
                    yield _report(rows, left_out)
    yield _report(rows, left_out)


def _report(rows: list[Report], left_out: int) -> Report:
    failed = [r for r in rows if not r["ok"]]
    report: Report = {"failed": len(failed), "checked": len(rows), "left_out": left_out}
    return report | {"failures": failed[:5], "rows": rows}


def _results(case: table.Case, args: list[Any], cotangent: Tensor | None) -> list[Tensor]:
    return [case.call(*args)] if cotangent is None else with_gradient(case, args, cotangent)


def _bars(
    case: table.Case,
    dtype: torch.dtype,
    backend: str,
    truth: list[Tensor],
    cotangent: Tensor | None,
) -> list[float]:
    """The largest errors allowed: twice PyTorch's own and a unit of rounding."""
    if cotangent is None:
        return [NEAR_TIES]
    bars = [0.0] * len(truth)
    # As in the tests, the rounding of SDPA's own kernels counts as PyTorch's.
    for fused in (False, True) if backend == "sdpa" else (False,):
        found = yardstick(case, case.args(dtype), cotangent, fused)
        bars = [max(b, error(r, t)) for b, r, t in zip(bars, found, truth, strict=True)]
    return [2 * bar + torch.finfo(dtype).eps / 2 for bar in bars]


def _compared(
    args: list[Any],
    case: table.Case,
    backend: str,
    truth: list[Tensor],
    cotangent: Tensor | None,
    bars: list[float],
) -> Report:
    with mcibi_fast.backend(backend):
        got = _results(case, args, cotangent)
    errors = [_error(r, t) for r, t in zip(got, truth, strict=True)]
    ok = all(e <= b for e, b in zip(errors, bars, strict=True))  # NaN is not
    return {"errors": errors, "allowed": bars, "ok": ok}


def _error(result: Tensor, truth: Tensor) -> float:
    """Relative error; for classes the share that differs, for counts the share moved."""
    if truth.is_floating_point():
        return error(result, truth)
    if truth.dim() == 3:  # classes of pixels
        return float((result != truth).double().mean())
    return float((result - truth).abs().sum() / (2 * truth.sum()))
