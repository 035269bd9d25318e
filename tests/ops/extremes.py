"""Numbers of any size for all ops: scales from 1e-3 to 1e30, infinities, NaN, the lowest number.

One table, run on every executor: the CPU's kernels, CUDA's on the host executor, Triton's under its
interpreter. The yardstick is plain PyTorch in the same dtype, and in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

import mcibi_fast
from tests.ops.table import (
    Case,
    aggregate_case,
    argmax_case,
    attention_case,
    class_rank_case,
    confusion_case,
    cross_entropy_case,
    eager,
    sums_case,
    update_case,
)


def _some(value: float) -> Callable[[Tensor], Tensor]:
    """Replaces three of a hundred elements, at least one."""

    def replaced(t: Tensor) -> Tensor:
        chosen = torch.rand(t.shape, generator=Generator().manual_seed(3)) < 0.03
        chosen.view(-1)[t.numel() // 2] = True
        return t.masked_fill(chosen, value)

    return replaced


LOWEST = -3e38
# What is done to the first input of a case.
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        f"{scale:g}": lambda t, s=scale: t * s for scale in (1e-3, 1.0, 100.0, 1e4, 1e9, 1e20, 1e30)
    },
    "shifted": lambda t: t + 1e4,
    **{str(value): _some(value) for value in (torch.inf, -torch.inf, torch.nan, LOWEST)},
    "all the lowest": lambda t: torch.full_like(t, LOWEST),
    "all -inf": lambda t: torch.full_like(t, -torch.inf),
}

# Upsampled by powers of two or not at all: the weights of the interpolation are exact, so that
# PyTorch multiplies an infinity by 0 where the kernels do.
CASES = [
    cross_entropy_case((2, 7, 3, 5), (12, 20), "upsampled", reduction="none"),
    cross_entropy_case((1, 21, 5, 7), (5, 7), "same", reduction="none"),
    cross_entropy_case((1, 5, 6, 8), (3, 4), "smaller", weighted=True, reduction="none"),
    cross_entropy_case((1, 7, 3, 5), (12, 20), "smooth", label_smoothing=0.1, reduction="none"),
    argmax_case((2, 7, 3, 5), (12, 20), "upsampled"),
    argmax_case((1, 21, 5, 7), (5, 7), "same"),
    confusion_case((2, 7, 3, 5), (12, 20), "upsampled"),
    sums_case((2, 6, 3, 5), (12, 20), 4, "upsampled"),
    sums_case((1, 6, 5, 7), (5, 7), 4, "same"),
    update_case((2, 6, 3, 5), (12, 20), 4, "upsampled"),
    aggregate_case((2, 7, 3, 5), 10, "soft"),
    replace(aggregate_case((2, 7, 3, 5), 10, "hard", hard=True), differentiable=()),
    class_rank_case(1, 37, 7, "soft"),
    class_rank_case(1, 37, 21, "more classes"),
    class_rank_case(1, 37, 7, "hard", hard=True),
    attention_case(21, 37, 16, 24, "wide"),
]
# The memory update takes the features second.
PLACES = {"memory_update": 1}
# Sums over pixels. Where the interpolation multiplies an infinity by 0, PyTorch adds the NaN to the
# sum; the kernels leave out what has no weight, so that there an infinity may remain one.
SUMS = ("class_feature_sums", "memory_update")


def runs(*ops: str) -> list[tuple[Case, str]]:
    """Cases of these ops, with the names of the numbers that they are given."""
    return [(case, name) for case in CASES if case.name in ops for name in NUMBERS]


def check(case: Case, numbers: str, backend: str) -> None:
    """Results and gradients are finite, infinite or NaN where PyTorch's are, in float32 or exactly;
    the finite ones have at most twice its error.

    The scores of attention are (scale Q) K^T or scale (Q K^T), and sums over pixels have an order,
    which round differently; PyTorch's error is the larger of that of the reference and of `eager`.
    """
    found = _results(case, numbers, torch.float32, backend)
    pytorch = [_results(case, numbers, torch.float32, "reference")]
    if case.name.endswith("attention") or case.name in SUMS:
        pytorch.append(_results(case, numbers, torch.float32, None))
    exact = _results(case, numbers, torch.float64, "reference")
    for name, result in found.items():
        theirs = [results[name] for results in pytorch]
        if result.is_floating_point():
            _check_one(name, result, theirs, exact[name], only_finite=case.name in SUMS)
        else:
            assert torch.equal(result, theirs[0]), name


def _check_one(
    name: str, found: Tensor, pytorch: list[Tensor], exact: Tensor, only_finite: bool
) -> None:
    kinds = torch.stack([_kind(t) for t in (found, *pytorch, exact.float())])
    if only_finite:
        kinds = (kinds != 0).int()
    other = (kinds[0] != kinds[1:]).all(0)
    assert not other.any(), f"{name}: {int(other.sum())} of {other.numel()} are of another kind"
    finite = (kinds == 0).all(0)
    truth = exact[finite].double()
    error, *bars = (float((t[finite].double() - truth).norm()) for t in (found, *pytorch))
    # A rounding, where PyTorch happens to be exact; and what float64 itself leaves of a gradient
    # whose terms, of the size of 1, cancel.
    unit = torch.finfo(found.dtype).eps / 2 * float(truth.norm()) + 1e-15
    assert error <= 2 * max(bars) + unit, f"{name}: error {error:.2e}, PyTorch's {bars}"


def _kind(t: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(t.isnan(), 2, t.isinf() * t.sign().nan_to_num()).int()


def _results(
    case: Case, numbers: str, dtype: torch.dtype, backend: str | None
) -> dict[str, Tensor]:
    """The first result and the gradients, from the same numbers of float32 in any dtype; without a
    backend those of ``eager``."""
    args = case.args(dtype)
    place = PLACES.get(case.name, 0)
    args[place] = NUMBERS[numbers](case.args(torch.float32)[place]).to(dtype)
    if case.name == "upsample_cross_entropy":
        # An ignored pixel with a NaN has the gradient 0 here, and in PyTorch 0 times NaN.
        args[1] = args[1].where(args[1] != 255, 0)
    for i in case.differentiable:
        args[i] = args[i].requires_grad_()
    with mcibi_fast.backend(backend or "auto"):
        result = case.call(*args) if backend else eager(case, args)
        results = {"result": result.detach()}
        if case.differentiable:
            g = Generator().manual_seed(1)
            cotangent = torch.randn(result.shape, generator=g, dtype=torch.float32)
            leaves = [args[i] for i in case.differentiable]
            grads = torch.autograd.grad(result, leaves, cotangent.to(result.dtype))
            results |= {f"gradient {i}": g for i, g in zip(case.differentiable, grads, strict=True)}
    return results
