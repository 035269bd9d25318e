"""Eager calls run their kernel without PyTorch's dispatcher, and nothing else does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mcibi_fast
from mcibi_fast import _build, ops
from mcibi_fast.ops import measured, modes
from mcibi_fast.ops.dispatch import BACKENDS
from mcibi_fast.ops.measured import multiplies_bfloat16
from mcibi_fast.ops.modes import direct
from mcibi_fast.ops.upsample_cross_entropy import CROSS_ENTROPY, REDUCED, why_not_one_pass

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
    for block in (torch.autocast("cpu"), FunctionMode(), DispatchMode(), FakeTensorMode()):
        with block:
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
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_maps_that_are_reduced_have_a_backward_of_their_own(
    reduction: str, dtype: torch.dtype
) -> None:
    labels = torch.randint(0, 40, (1, 9, 7), generator=G)
    labels[0, 3] = 255
    for height, own in ((81, True), (80, False)):  # 40 classes and 81 columns: 2^18 logits
        logits = torch.randn(1, 40, height, 81, generator=G, dtype=dtype)
        assert measured.is_reduced(logits, labels) == own
        assert not measured.is_reduced(logits, labels.new_zeros(1, 162, 162))
        options = {"reduction": reduction}
        ours, theirs = (losses(logits, labels, name, **options) for name in ("cpu", "reference"))
        for found, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, right)
        loss = ops.upsample_cross_entropy(logits.requires_grad_(), labels, **options)
        assert ("ReducedUpsampleCrossEntropy" in loss.grad_fn.name()) != own


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


@needs_kernels
def test_without_values_of_ignored_pixels_whatever_they_are() -> None:
    for classes in (3, 19):
        logits = torch.randn(2, classes, 8, 9, generator=G)
        logits[0, :, 0] = torch.nan  # the ignored row
        loss, grad = losses(logits, LABELS, "cpu")
        right = F.cross_entropy(logits.nan_to_num(), LABELS, ignore_index=255)
        torch.testing.assert_close(loss, right)
        assert grad.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("classes", [3, 19])
def test_the_saved_gradient_takes_any_cotangent(classes: int) -> None:
    """It was computed before the cotangent was known."""
    logits = torch.randn(1, classes, 8, 9, generator=G).half()
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
def test_the_saved_gradient_is_not_differentiated_again() -> None:
    leaf = torch.randn(1, 3, 8, 9, generator=G, requires_grad=True)
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


@needs_kernels
def test_class_rank_attention_of_many_classes_in_bfloat16_forms_the_scores() -> None:
    def explained(N: int, K: int) -> str:
        rows = torch.zeros(1, N, K, dtype=torch.bfloat16)
        return mcibi_fast.explain("class_rank_attention", rows, rows, scale=1.0).splitlines()[0]

    wide = "pytorch" if multiplies_bfloat16() else "cpu"
    assert explained(128, 64) == f"class_rank_attention: {wide}"
    assert explained(128, 63) == explained(4097, 64) == "class_rank_attention: cpu"


@needs_kernels
def test_gradients_of_a_reduced_loss_that_are_batched_or_not_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, 6, generator=generator).requires_grad_()
    labels = torch.randint(0, 5, (2, 14, 12), generator=generator)
    loss = ops.upsample_cross_entropy(logits, labels)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.0])
    (each,) = torch.autograd.grad(loss, logits, factors, is_grads_batched=True)
    assert one.any() and torch.equal(each, torch.stack([one, -2 * one, 0 * one]))
    ignored = ops.upsample_cross_entropy(logits, torch.full_like(labels, 255), reduction="sum")
    (none,) = torch.autograd.grad(ignored, logits, torch.tensor(torch.inf))
    assert not none.any()
