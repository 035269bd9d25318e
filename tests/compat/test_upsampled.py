"""The stand-in for upsampled logits against `F.interpolate`, in all that is done with logits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mcibi_fast.compat.adapter import Postponing
from mcibi_fast.compat.upsampled import Upsampled, upsample
from tests.compat.dropin import Formed, assert_close

B, K, LOW, SIZE = 2, 5, (6, 7), (20, 25)
Use = Callable[[Any, Tensor], Any]


def both(
    use: Use,
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.float64,
    last: bool = False,
    exact: bool = False,
) -> tuple[list[list[Tensor]], bool]:
    """Results and the gradient of the logits with the stand-in and without; was it computed?"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, K, *LOW, generator=generator, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x = x.double() if exact else x
    y = torch.randint(0, K, (B, *SIZE), generator=generator)
    y[0, :4] = 255
    results, computed = [], False
    for postponed in (True, False):
        low = x.clone().requires_grad_()
        if postponed:
            logits = upsample(low * 1, SIZE, align_corners)
            assert type(logits) is Upsampled
        else:
            options: Any = {"mode": "bilinear", "align_corners": align_corners}
            logits = F.interpolate(low * 1, SIZE, **options)
        found = use(logits, y)
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        parts = [t.sum() for t in found if isinstance(t, Tensor) and t.requires_grad]
        if parts:
            torch.stack(parts).sum().backward()
            found.append(low.grad)
        results.append([torch.as_tensor(t) for t in found])
        computed = computed or (type(logits) is Upsampled and logits._value is not None)
    return results, computed


WEIGHT = torch.tensor([0.5, 1, 0, 2, 1], dtype=torch.float64)
READ: dict[str, Use] = {
    "mean": lambda u, y: F.cross_entropy(u, y, ignore_index=255),
    "module": lambda u, y: torch.nn.CrossEntropyLoss(ignore_index=255)(u, y),
    "sum": lambda u, y: F.cross_entropy(u, y, ignore_index=255, reduction="sum"),
    "none": lambda u, y: F.cross_entropy(u, y, WEIGHT, ignore_index=255, reduction="none"),
    "weights": lambda u, y: F.cross_entropy(u, y, WEIGHT, ignore_index=255, label_smoothing=0.1),
    "all ignored": lambda u, y: F.cross_entropy(u, y.where(y < 0, 255), ignore_index=255),
    "ignored class": lambda u, y: F.cross_entropy(u, y.where(y < K, 0), ignore_index=2),
    "argmax": lambda u, y: u.argmax(1),
    "argmax kept": lambda u, y: torch.argmax(u, dim=-3, keepdim=True),
    "detached": lambda u, y: u.detach().argmax(1),
    "data": lambda u, y: u.data.max(1)[1],
    "one image": lambda u, y: u[-1].argmax(0),
    "some images": lambda u, y: u[1:, :, : SIZE[0]].argmax(dim=1),
    "max": lambda u, y: u.max(1),
    "max kept": lambda u, y: torch.max(u, dim=1, keepdim=True),
    "topk": lambda u, y: u.topk(1, dim=1),
    "float": lambda u, y: u.float().argmax(1),
    "same": lambda u, y: F.cross_entropy(u.to("cpu").contiguous(), y, ignore_index=255),
    "to its size": lambda u, y: F.interpolate(u, SIZE, mode="bilinear").argmax(1),
    "as post-processing": lambda u, y: F.interpolate(
        u[1].unsqueeze(dim=0), size=SIZE, mode="bilinear", align_corners=False
    )[0].argmax(dim=0),
    "a batch of one": lambda u, y: [
        u[0][None].argmax(1),
        u[1].reshape(-1, *u.shape[1:]).argmax(1),
        torch.reshape(u[1], shape=(1, K, *SIZE)).argmax(1),
        u[:1].squeeze().argmax(0),
        u[:1].view(K, -1, SIZE[1]).argmax(0),
        u[1:][..., :].squeeze(0).argmax(-3),
    ],
    "images": lambda u, y: [*(x.argmax(0) for x in u), *u.unbind()[1].max(0)],
    "crop": lambda u, y: [u[..., 2:15, :-3].argmax(1), *u[1, :, 3:, 4:][:, :9].max(0)],
    "loss of a crop": lambda u, y: F.cross_entropy(
        u[:, :, 2:15, 3:], y[:, 2:15, 3:], WEIGHT, ignore_index=255
    ),
    "losses of a crop": lambda u, y: F.cross_entropy(
        u[..., 3:], y[..., 3:], ignore_index=255, reduction="none"
    ),
    "flip": lambda u, y: [u.flip(-1).argmax(1), *u[:, :, 2:9, 3:].flip(dims=(2, 3)).max(1)],
    "loss of a flip": lambda u, y: F.cross_entropy(
        torch.flip(u, (3,)), y.flip(2), ignore_index=255
    ),
    "softmax": lambda u, y: [
        *u.softmax(1).max(1),
        F.softmax(u, dim=1)[..., 1:9].argmax(1),
        torch.softmax(u, -3).topk(1, 1)[1],
        torch.nn.Softmax2d()(u)[1].argmax(0),
        *u[1].softmax(0).flip(-2).max(0),
    ],
    "log_softmax": lambda u, y: [*F.log_softmax(u, 1).max(1), u[0].log_softmax(0).argmax(0)],
    "nll_loss": lambda u, y: [
        F.nll_loss(F.log_softmax(u, 1), y, ignore_index=255),
        torch.nn.NLLLoss(WEIGHT, ignore_index=255, reduction="none")(u.log_softmax(1), y),
    ],
    "NumPy's names": lambda u, y: [u.argmax(axis=1), *u.max(axis=1, keepdims=True)],
    "copies": lambda u, y: [u.clone().argmax(1), u.to(y.double()).argmax(1)],
    "by name": lambda u, y: [
        F.cross_entropy(input=u, target=y, ignore_index=255),
        torch.argmax(input=u, dim=1),
        torch.numel(input=u),
    ],
    "metadata": lambda u, y: [u.requires_grad, len(u), u.dim(), *u.shape, u.new_ones(3)],
}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", READ)
def test_read_without_being_computed(name: str, align_corners: bool) -> None:
    (got, expected), computed = both(READ[name], align_corners=align_corners)
    assert not computed
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def in_place(u: Any, y: Tensor) -> Any:
    shared = u.detach()
    u.mul_(2)
    return F.cross_entropy(u, y, ignore_index=255), shared.argmax(1), shared.sum()


def in_place_on_a_view(u: Any, y: Tensor) -> Any:
    before = u.float()
    u[0].zero_()
    return u.argmax(1), before.argmax(1)


def hooked(u: Any, y: Tensor) -> Any:
    u.register_hook(lambda grad: 3 * grad)
    u.retain_grad()
    F.cross_entropy(u, y, ignore_index=255).backward()
    return u.grad


class Twice(torch.autograd.Function):
    """What takes the stand-in itself, so that the gradient is that of its own node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


COMPUTE: dict[str, Use] = {
    "arithmetic": lambda u, y: 2 * u + 1,
    "softmax": lambda u, y: u.softmax(1).max(1),
    "log_softmax": lambda u, y: F.nll_loss(F.log_softmax(u, 1), y, ignore_index=255),
    "probabilities": lambda u, y: F.cross_entropy(u, u.detach().softmax(1)),
    "cat": lambda u, y: torch.cat([u, u]),
    "index": lambda u, y: u[:, 1:, ::2],
    "iteration": lambda u, y: [x.sum() for x in u],
    "second derivative": lambda u, y: torch.autograd.grad(
        u.pow(3).sum(), u, create_graph=True
    )[0],
    "in place": in_place,
    "in place on a view": in_place_on_a_view,
    "hooks": hooked,
    "more than one": lambda u, y: [u.mean(), F.cross_entropy(u, y, ignore_index=255)],
    "parts": lambda u, y: [
        u[..., 2:9, :5].sin().sum(), u.flip(-1)[:, :, 3:].cos().sum(), u[1].unsqueeze(0).exp().sum()
    ],
    "softmaxes": lambda u, y: [u.softmax(1).sin().sum(), u[..., 1:].log_softmax(1).cos().sum()],
    "its own node": lambda u, y: [
        Twice.apply(u[..., 2:9, 1:5]).sin().sum(),
        Twice.apply(u.softmax(1)).sin().sum(),
        Twice.apply(u[0, :, 2:].log_softmax(0)).cos().sum(),
    ],
    "softmax over pixels": lambda u, y: [u.softmax(2).sum(1), u.softmax(1).softmax(1).argmax(1)],
    "other shapes": lambda u, y: [
        u.reshape(B, K, -1).argmax(1), u.view(-1).sum(), u.flip(1).argmax(1), u[[0]].argmax(1),
        u.unsqueeze(1).shape[1] + u.squeeze(3).sum(), u[:, 1:].argmax(1), u[..., None].argmax(1),
    ],
    "resized again": lambda u, y: [
        F.interpolate(u, (31, 30), mode="bilinear").argmax(1),
        F.interpolate(u[..., 2:], (31, 30), mode="bilinear").sin().sum(),
        F.interpolate(u.softmax(1), (9, 9), mode="bilinear").sin().sum(),
    ],
    "numpy": lambda u, y: u.detach().numpy().sum(),
    "list": lambda u, y: u.tolist(),
    "another tensor's method": lambda u, y: [torch.ones(3).to(u), torch.max(torch.zeros(()), u)],
    "other arguments": lambda u, y: [torch.max(input=u, other=u), u.float(), u.contiguous()],
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTE)
def test_anything_else_sees_an_ordinary_tensor(name: str) -> None:
    (got, expected), _ = both(COMPUTE[name])
    for a, b in zip(got, expected, strict=True):
        assert type(a) is Tensor and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_second_resize_forms_the_first_alone() -> None:
    """Two interpolations are not one; the result of the second can wait."""
    logits = upsample(torch.randn(B, K, *LOW), SIZE, False)
    with Formed(B, K, 40, 50) as second, Formed(B, K, *SIZE) as first:
        F.interpolate(logits, (40, 50), mode="bilinear").argmax(1)
    assert first.found and not second.found


def test_layout_is_that_of_interpolate() -> None:
    for last in (False, True):
        (got, expected), _ = both(lambda u, y: list(u.stride()), last=last)
        assert got == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    """The loss has PyTorch's dtype, without and under autocast, and at most twice its error."""
    use = READ["mean"]
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            (got, expected), computed = both(use, dtype=dtype)
        exact = both(use, dtype=dtype, exact=True)[0][1]
        assert not computed
        for a, b, c in zip(got, expected, exact, strict=True):
            assert a.dtype == b.dtype
            a, b = a.detach(), b.detach()
            slack = torch.finfo(a.dtype).eps * float(c.detach().abs().max())
            assert float((a - c).abs().max()) <= 2 * float((b - c).abs().max()) + slack


def test_wrong_labels_are_the_errors_of_pytorch() -> None:
    logits = upsample(torch.randn(B, K, *LOW), SIZE, False)
    for labels in (torch.zeros(B, 3, 3).long(), torch.zeros(B, *SIZE, dtype=torch.int32)):
        with pytest.raises(RuntimeError):
            F.cross_entropy(logits, labels)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant: bool) -> None:
    """A reentrant checkpoint replaces autograd's history: the stand-in must follow it."""
    y = torch.zeros(B, *SIZE).long()
    gradients = []
    for up in (upsample, lambda x, size, _: F.interpolate(x, size, mode="bilinear")):
        x = torch.ones(B, K, *LOW, dtype=torch.float64).cumsum(1).requires_grad_()
        out = checkpoint(lambda x, up=up: up(x.sin(), SIZE, False), x, use_reentrant=reentrant)
        F.cross_entropy(out, y).backward()
        gradients.append(x.grad)
    assert_close(gradients[:1], gradients[1:])


def test_copies_and_files() -> None:
    low = torch.randn(B, K, *LOW)
    expected = F.interpolate(low, SIZE, mode="bilinear")
    file = io.BytesIO()
    torch.save(upsample(low, SIZE, False), file)
    file.seek(0)
    for copied in (
        copy.deepcopy(upsample(low, SIZE, False)),
        pickle.loads(pickle.dumps(upsample(low, SIZE, False))),
        torch.load(file),
    ):
        assert type(copied) is Tensor and torch.equal(copied, expected)
    assert repr(upsample(low, SIZE, False)) == repr(expected)


def test_computed_under_no_grad_and_used_with_a_gradient() -> None:
    low = torch.randn(B, K, *LOW, requires_grad=True)
    logits = upsample(low, SIZE, False)
    with torch.inference_mode():
        logits.mean()
    logits.sum().backward()
    assert float(low.grad.sum()) == pytest.approx(B * K * SIZE[0] * SIZE[1], rel=1e-5)


def test_what_would_give_wrong_values_is_an_error() -> None:
    low = torch.randn(B, K, *LOW)
    logits = upsample(low, SIZE, False)
    low.mul_(2)
    for read in (lambda: logits.argmax(1), lambda: logits + 1):
        with pytest.raises(RuntimeError, match="logits were changed in place after"):
            read()
    logits = upsample(low, SIZE, False)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="writes into"):
        logits.mul_(2)  # as C++ code would call it


def test_it_can_be_a_key() -> None:
    logits = upsample(torch.randn(B, K, *LOW), SIZE, False)
    found = {logits: 1}
    assert logits._value is None
    logits + 1
    assert found[logits] == 1


def test_what_is_not_postponed() -> None:
    plain = torch.randn(B, K, *LOW)
    for low, size in ((plain[:, :1], SIZE), (plain, (3, 3)), (plain.half().to("meta"), SIZE)):
        expected = F.interpolate(low, size, mode="bilinear")
        found = upsample(low, size, False)
        assert type(found) is Tensor or low.is_meta
        assert found.shape == expected.shape
    gradient = torch.func.grad(lambda x: upsample(x, SIZE, False).pow(2).sum())
    expected = torch.func.grad(lambda x: F.interpolate(x, SIZE, mode="bilinear").pow(2).sum())
    assert torch.equal(gradient(plain), expected(plain))


def test_which_interpolations_are_postponed() -> None:
    low = torch.randn(B, K, *LOW)
    with Postponing(K):
        postponed = [
            F.interpolate(low, SIZE, mode="bilinear"),
            F.interpolate(low, list(SIZE), None, "bilinear", True),
            F.interpolate(low, scale_factor=3, mode="bilinear"),
            F.interpolate(low, scale_factor=(2.0, 3.0), mode="bilinear"),
        ]
        others = [
            F.interpolate(low, scale_factor=2.1, mode="bilinear"),  # not a whole number of rows
            F.interpolate(low, SIZE, mode="bilinear", antialias=True),
            F.interpolate(low, SIZE),
            F.interpolate(low, SIZE, mode="bicubic"),
            F.interpolate(low[:, :3], SIZE, mode="bilinear"),
        ]
    assert {type(x) for x in postponed} == {Upsampled} and {type(x) for x in others} == {Tensor}
    assert postponed[1].align_corners and postponed[2].shape == (B, K, 18, 21)
    expected = F.interpolate(low, scale_factor=(2.0, 3.0), mode="bilinear")
    torch.testing.assert_close(postponed[3] + 0, expected)
