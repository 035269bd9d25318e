"""Eager calls run their kernel without PyTorch's dispatcher, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mcibi_fast
from mcibi_fast import _build, ops
from mcibi_fast.ops import dispatch, measured, modes, triton_support
from mcibi_fast.ops.dispatch import BACKENDS
from mcibi_fast.ops.modes import direct
from mcibi_fast.ops.upsample_cross_entropy import CROSS_ENTROPY, REDUCED, why_not_one_pass
from tests.ops.table import SMALL, Case

needs_kernels = pytest.mark.skipif(
    _build.load_extensions()["cpu"] is not None, reason="needs the CPU's kernels"
)


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_plain_tensors_are_direct() -> None:
    plain = torch.zeros(2, 3)
    assert direct((plain, plain.mT, torch.nn.Parameter(plain), 3, None, 0.5))
    with torch.no_grad():
        assert direct((plain,))
    with torch.inference_mode():
        assert direct((plain, torch.zeros(2)))


def test_plain_tensors_on_cuda_are_direct() -> None:
    """As far as that is seen without a GPU: by what a fake tensor has as well."""
    with FakeTensorMode():
        try:
            fake = torch.empty(2, device="cuda")
        except Exception as error:
            pytest.skip(f"needs PyTorch with CUDA: {error}")
    assert fake.is_cuda and modes._dense(fake)
    assert not direct((fake,))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_direct_calls_on_cuda_run_what_the_dispatcher_would(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the CPU's kernels: shown by fake tensors of a GPU that is said to be new enough."""
    monkeypatch.setattr(triton_support, "_gpu_too_old", lambda device: None)
    monkeypatch.setattr(_build, "why_not_on", lambda _device: None)
    op = dispatch._ops[case.name]
    args = op.prepare(*case.args(torch.float32), **case.options)
    with FakeTensorMode() as mode:
        try:
            torch.empty(2, device="cuda")
        except Exception as error:
            pytest.skip(f"needs PyTorch with CUDA: {error}")
        args = [mode.from_tensor(a).cuda() if isinstance(a, Tensor) else a for a in args]
        chosen = op._select_directly(tuple(args))
        assert chosen is op.select(*args) and chosen.backend != "cpu"
        if case.name.endswith("attention") and triton_support._installed():
            assert chosen.backend == "triton"


def test_calls_on_cuda_take_kernels_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those for the CPU, nor the reference, whichever parts are there."""
    monkeypatch.setattr(_build, "load_extensions", lambda: dict.fromkeys(BACKENDS))
    monkeypatch.setattr(_build, "why_not_on", lambda _device: None)
    with FakeTensorMode():
        try:
            logits = torch.empty(1, 3, 2, 2, device="cuda")
        except Exception as error:
            pytest.skip(f"needs PyTorch with CUDA: {error}")
        labels = torch.zeros(1, 4, 4, dtype=torch.int64, device="cuda")
    for op in (CROSS_ENTROPY, REDUCED):
        assert op._select_directly((logits, labels)).backend == "cuda"


def test_why_cuda_takes_two_passes_for_a_loss_and_its_gradient() -> None:
    """By what the kernels' own limits are; see tests/csrc for those."""

    def reason(K: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> str:
        return str(why_not_one_pass(torch.empty(1, K, h, w, dtype=dtype), torch.empty(1, 64, 64)))

    assert reason(192, 16, 8) == reason(1, 1, 1, torch.bfloat16) == "None"
    assert "more than 192 classes" in reason(193, 8, 8)
    assert "float64" in reason(19, 8, 8, torch.float64)
    assert "fewer than 4 x 4 labels" in reason(19, 17, 8)
    assert "fewer than 4 x 4 labels" in reason(19, 8, 128)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_calls_under_autocast_are_direct(case: Case) -> None:
    """Their operators run outside autocast, in the dtype that it asked for."""
    args = case.args(torch.float32)
    leaves = [args[i].requires_grad_() for i in case.differentiable]
    low = args if case.name.endswith("attention") else []
    low = args[:1] if case.name == "gaussian_aggregate" else low
    cast = [a.bfloat16() for a in low] + list(args[len(low) :])
    expected = case.call(*cast)
    with torch.autocast("cpu", torch.bfloat16):
        assert direct(args)
        found = case.call(*args)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    if leaves:
        ones = torch.ones_like(found)
        grads, rights = (torch.autograd.grad(out, leaves, ones) for out in (found, expected))
        assert all(torch.equal(g, right) for g, right in zip(grads, rights, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_needs_the_dispatcher_is_not() -> None:
    plain = torch.zeros(2, 3)
    others = [
        plain.to("meta"),
        torch._neg_view(plain),
        plain.to_sparse(),
        torch.zeros(2).to_mkldnn(),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    ]
    with FakeTensorMode() as mode:
        others.append(mode.from_tensor(plain))
    for other in others:
        assert not direct((plain, other))
    for block in (FunctionMode(), DispatchMode(), FakeTensorMode()):
        with block:
            assert not direct((plain,))
        with torch.autocast("cpu"), block:
            assert not direct((plain,))
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(direct((row,))), row)[1])(plain)
    torch.func.jvp(lambda x: (seen.append(direct((x,))), x)[1], (plain,), (plain,))
    torch.jit.trace(lambda x: (seen.append(direct((x,))), x + 1)[1], (plain,), check_trace=False)
    assert seen and not any(seen)


# ---- the reduced cross entropy, which only direct calls use -------------------------------------

G = Generator().manual_seed(0)
LABELS = torch.randint(0, 3, (2, 8, 9), generator=G)
LABELS[0, 0] = 255


def losses(
    logits: Tensor, labels: Tensor, backend: str, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    with mcibi_fast.backend(backend):
        loss = ops.upsample_cross_entropy(leaf, labels, **options)  # type: ignore[arg-type]
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@needs_kernels
@pytest.mark.parametrize("classes", [2, 3, 19])  # on planes, and on rows of classes
@pytest.mark.parametrize("size", [(4, 5), (8, 9), (20, 21)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced_losses_are_the_references(
    classes: int, size: tuple[int, int], weighted: bool, reduction: str
) -> None:
    logits = torch.randn(2, classes, *size, generator=G, dtype=torch.float64)
    labels = LABELS.where(LABELS == 255, LABELS % classes)
    weight = torch.rand(classes, generator=G, dtype=torch.float64) if weighted else None
    for smoothing in (0.0, 0.1):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        ours, theirs = (losses(logits, labels, name, **options) for name in ("cpu", "reference"))
        for found, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [1, 2, 19, 150])  # on planes, and on rows of classes
@pytest.mark.parametrize("size", [(18, 14), (19, 29), (10, 7), (33, 64), (9, 28)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_maps_larger_than_the_labels_have_a_backward_of_their_own(
    align_corners: bool, size: tuple[int, int], classes: int, layout: torch.memory_format
) -> None:
    labels = torch.randint(0, classes, (2, 9, 7), generator=G)
    labels[0, 3], labels[1, :, :5] = 255, 255
    logits = torch.randn(2, classes, *size, generator=G, dtype=torch.float64)
    logits = logits.contiguous(memory_format=layout)
    weight = torch.rand(classes, generator=G, dtype=torch.float64)
    assert measured.is_reduced(logits, labels)
    assert not measured.is_reduced(logits, labels.new_zeros(2, *size))
    for reduction, smoothing in (("mean", 0.0), ("sum", 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
        options["align_corners"] = align_corners
        ours, theirs = (losses(logits, labels, name, **options) for name in ("cpu", "reference"))
        for found, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
        loss = ops.upsample_cross_entropy(logits.clone().requires_grad_(), labels, **options)
        assert "DeferredUpsampleCrossEntropy" in loss.grad_fn.name()


@needs_kernels
def test_nothing_to_average() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=G)
    loss, grad = losses(logits, torch.full_like(LABELS, 255), "cpu")
    assert loss == 0 and not grad.any()
    loss, _ = losses(logits, LABELS, "cpu", weight=torch.zeros(3))
    assert loss.isnan()
    bad = LABELS.clone()
    bad[1, 2, 3] = 7
    with pytest.raises(ValueError, match=r"value 7 at \(b=1, y=2, x=3\)"):
        ops.upsample_cross_entropy(logits, bad)


SIZES = pytest.mark.parametrize("size", [(8, 9), (16, 19)])  # the labels', and larger


@needs_kernels
@SIZES
def test_without_values_of_ignored_pixels_whatever_they_are(size: tuple[int, int]) -> None:
    for classes in (3, 19):
        logits = torch.randn(2, classes, *size, generator=G)
        logits[0, :, : size[0] // 8] = torch.nan  # what the ignored row reads
        loss, grad = losses(logits, LABELS, "cpu")
        known = F.interpolate(logits.nan_to_num(), LABELS.shape[1:], mode="bilinear")
        right = F.cross_entropy(known, LABELS, ignore_index=255)
        torch.testing.assert_close(loss, right)
        assert grad.isfinite().all()


@needs_kernels
@SIZES
@pytest.mark.parametrize("classes", [3, 19])
def test_the_gradient_takes_any_cotangent(classes: int, size: tuple[int, int]) -> None:
    """It may have been computed before the cotangent was known."""
    logits = torch.randn(1, classes, *size, generator=G).half()
    leaf = logits.clone().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, LABELS[1:], ignore_index=255)
    exact = losses(logits.double(), LABELS[1:], "reference")[1]
    for factor in (1.0, 2.0**20, 2.0**-3):  # in float16 the mean's gradient alone loses its digits
        scaled = (factor * loss).to(loss.dtype)
        (grad,) = torch.autograd.grad(scaled, leaf, retain_graph=True)
        right = (factor * exact).half()
        assert (grad - right).norm() <= 1e-3 * right.norm()
    leaf = logits.clone().fill_(torch.nan).requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, LABELS[1:], ignore_index=255)
    (grad,) = torch.autograd.grad(loss, leaf, torch.zeros_like(loss))
    assert not grad.any()  # a loss that does not count, whatever the logits


@needs_kernels
@SIZES
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_kept_graph_gives_its_gradient_again(size: tuple[int, int], factor: float) -> None:
    """Also where the first one was changed; the last backward alone may reuse what is saved."""
    logits = torch.randn(1, 3, *size, generator=G)
    right = factor * losses(logits, LABELS[1:], "reference")[1]
    leaf = logits.clone().requires_grad_()
    loss = factor * ops.upsample_cross_entropy(leaf, LABELS[1:], ignore_index=255)
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
        torch.testing.assert_close(leaf.grad, right)
        leaf.grad.zero_()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@needs_kernels
@SIZES
def test_the_gradient_is_not_differentiated_again(size: tuple[int, int]) -> None:
    leaf = torch.randn(1, 3, *size, generator=G, requires_grad=True)
    loss = ops.upsample_cross_entropy(leaf, LABELS[1:], ignore_index=255)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


# ---- measured choices ---------------------------------------------------------------------------


@needs_kernels
def test_explain_says_what_is_faster() -> None:
    rows = torch.randn(1, 4, 3, generator=G)
    text = mcibi_fast.explain("class_rank_attention", rows, rows, scale=1.0)
    assert text.startswith("class_rank_attention: sdpa")
    assert "could run, but scaled_dot_product_attention is faster up to 1024 scores" in text
    with mcibi_fast.backend("cpu"):  # forced, it runs all the same
        assert mcibi_fast.explain("class_rank_attention", rows, rows, scale=1.0).startswith(
            "class_rank_attention: cpu"
        )
        ours = ops.class_rank_attention(rows, rows, scale=1.0)
    torch.testing.assert_close(ours, ops.class_rank_attention(rows, rows, scale=1.0))


def test_attention_forms_few_scores_only() -> None:
    many, view = torch.zeros(1, 4096, 1), torch.zeros(1, 8, 256).mT
    assert mcibi_fast.explain("confidence_attention", view, view, view).startswith(
        "confidence_attention: pytorch"
    )
    text = mcibi_fast.explain("confidence_attention", many, many, many)
    assert text.startswith("confidence_attention: sdpa")
    assert "forms at most 4194304" in text


def test_attention_with_gradients_forms_the_scores_of_wide_rows() -> None:
    def explained(D: int, gradient: bool) -> str:
        rows = torch.zeros(1, 128, D, requires_grad=gradient)
        return mcibi_fast.explain("confidence_attention", rows, rows, rows).splitlines()[0]

    assert explained(192, True) == "confidence_attention: pytorch"
    assert explained(191, True) == explained(192, False) == "confidence_attention: sdpa"


@pytest.mark.parametrize("N", [12, 40, 130])  # few scores, fused attention, scores that are formed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_computed_in_float32_without_products_of_them(
    dtype: torch.dtype, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "multiplies", lambda dtype: dtype == torch.float32)
    operands = [torch.randn(1, N, 200, generator=G).to(dtype).requires_grad_() for _ in range(3)]
    cotangent = torch.randn(1, N, 200, generator=G).to(dtype)
    out = ops.confidence_attention(*operands)
    grads = torch.autograd.grad(out, operands, cotangent)
    wide = [t.detach().float().requires_grad_() for t in operands]
    right = ops.confidence_attention(*wide)
    rights = torch.autograd.grad(right, wide, cotangent.float())
    for found, exact in zip((out, *grads), (right, *rights), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@needs_kernels
def test_class_rank_attention_of_many_classes_in_bfloat16_forms_the_scores() -> None:
    def explained(N: int, K: int) -> str:
        rows = torch.zeros(1, N, K, dtype=torch.bfloat16)
        return mcibi_fast.explain("class_rank_attention", rows, rows, scale=1.0).splitlines()[0]

    wide = "pytorch" if measured.multiplies(torch.bfloat16) else "cpu"
    assert explained(128, 64) == f"class_rank_attention: {wide}"
    assert explained(128, 63) == explained(4097, 64) == "class_rank_attention: cpu"


@needs_kernels
@pytest.mark.parametrize("size", [(7, 6), (29, 24)])  # smaller than the labels, and larger
def test_gradients_of_a_reduced_loss_that_are_batched_or_not_finite(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, *size, generator=generator).requires_grad_()
    labels = torch.randint(0, 5, (2, 14, 12), generator=generator)
    loss = ops.upsample_cross_entropy(logits, labels)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.0])
    (each,) = torch.autograd.grad(loss, logits, factors, is_grads_batched=True)
    assert one.any() and torch.equal(each, torch.stack([one, -2 * one, 0 * one]))
    ignored = ops.upsample_cross_entropy(logits, torch.full_like(labels, 255), reduction="sum")
    (none,) = torch.autograd.grad(ignored, logits, torch.tensor(torch.inf))
    assert not none.any()


@needs_kernels
def test_class_rank_attention_with_gradients_takes_pytorchs_kernel_for_many_classes() -> None:
    def explained(N: int, K: int, gradient: bool = True) -> str:
        rows = torch.zeros(1, N, K, requires_grad=gradient)
        return mcibi_fast.explain("class_rank_attention", rows, rows, scale=1.0).splitlines()[0]

    sdpa, ours = "class_rank_attention: sdpa", "class_rank_attention: cpu"
    assert explained(64, 19) == explained(65, 60) == explained(4095, 60) == sdpa
    assert explained(64, 19, False) == explained(65, 60, False) == ours
    assert explained(65, 59) == explained(4096, 60) == ours


@needs_kernels
@pytest.mark.parametrize(("N", "K"), [(40, 7), (67, 61)])
def test_gradients_of_class_rank_attention_by_pytorchs_kernel(N: int, K: int) -> None:
    Q, W, cotangent = torch.randn(3, 2, N, K, generator=G).unbind()

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (Q, W)]
        with mcibi_fast.backend(name):
            out = ops.class_rank_attention(*inputs, scale=0.3)
            return [out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))]

    exact = run("reference", torch.float64)
    for found, right in zip(run("auto", torch.float32), exact, strict=True):
        torch.testing.assert_close(found, right.float())


@needs_kernels
def test_aggregation_of_few_pixels_with_gradients_is_a_product() -> None:
    def explained(K: int, h: int, Z: int, gradient: bool = True, **options: Any) -> str:
        logits = torch.zeros(1, K, h, h, requires_grad=gradient, **options)
        memory, noise = torch.ones(K, 2), torch.zeros(K, Z)
        line, *_ = mcibi_fast.explain(
            "gaussian_aggregate", logits, memory, Z, noise=noise
        ).splitlines()
        return line.removeprefix("gaussian_aggregate: ")

    assert explained(128, 12, 64) == explained(1024, 1, 8) == "pytorch"
    assert explained(128, 12, 64, dtype=torch.float64) == "pytorch"
    assert explained(127, 12, 64) == explained(128, 13, 64) == "cpu"
    assert explained(128, 12, 64, False) == explained(128, 12, 64, dtype=torch.bfloat16) == "cpu"


@needs_kernels
@pytest.mark.parametrize("philox", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_aggregation_of_few_pixels(layout: torch.memory_format, philox: bool) -> None:
    """As a training step does it: the memory changes between the forward and the backward."""
    K, Z = 131, 67
    logits = torch.randn(2, K, 7, 10, generator=G).contiguous(memory_format=layout)
    memory, eps = torch.rand(K, 2, generator=G), torch.randn(K, Z, generator=G)
    cotangent = torch.randn(2, Z, 7, 10, generator=G)

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        x, M = logits.to(dtype).requires_grad_(), memory.to(dtype, copy=True)
        noise = ops.Philox(torch.tensor([5, 3])) if philox else eps.to(dtype)
        with mcibi_fast.backend(name):
            out = ops.gaussian_aggregate(x, M, Z, noise=noise)
            M.add_(100)
            return [out, *torch.autograd.grad(out, x, cotangent.to(dtype))]

    found, right = run("auto", torch.float32), run("reference", torch.float64)
    assert "GaussianAggregate" not in found[0].grad_fn.name()
    assert found[0].is_contiguous(memory_format=layout)
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours, exact.float())
