"""Calls torch.ops.mcibi_fast_cuda of the library named on the command line, which takes CPU
tensors, and compares with PyTorch."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from counted_labels import assert_counted_for_python  # this script's folder is on the path
from in_place import load_in_place

from mcibi_fast._schemas import OPS_WITH_LABELS
from mcibi_fast.ops.compiled import cuda_kernel
from mcibi_fast.ops.labels import check_labels

LABEL_OPS = OPS_WITH_LABELS["cuda"]


def reduced(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bad: int) -> None:
    """The reduced loss with its gradient."""
    ops = torch.ops.mcibi_fast_cuda
    K, options = logits.shape[1], (255, 0.1, True)
    known = labels.where(labels < K, -1)
    flag = torch.zeros(3, dtype=torch.int64)
    for mean in (False, True):
        exact = logits.double().requires_grad_()
        upsampled = F.interpolate(exact, (20, 23), mode="bilinear", align_corners=True)
        right = F.cross_entropy(
            *(upsampled, known, weight.double()),
            **{"ignore_index": -1, "label_smoothing": 0.1, "reduction": "sum"},
        )
        right = right / weight.double()[known[known >= 0]].sum() if mean else right
        (right_grad,) = torch.autograd.grad(right, exact)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = logits.contiguous(memory_format=layout)
            loss, sums = ops.upsample_cross_entropy_reduced(
                given, labels, weight, *options, mean, True, flag.zero_()
            )
            assert loss.shape == () and loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), right.detach(), rtol=1e-6, atol=0)
            for dtype in (torch.float32, torch.bfloat16):
                like = given.to(dtype)
                grad = ops.upsample_cross_entropy_gather(torch.tensor(2.0), sums, like, 20, 23)
                assert grad.stride() == given.stride() and grad.dtype == dtype
                torch.testing.assert_close(grad, (2 * right_grad).to(dtype), rtol=1e-2, atol=1e-5)
            assert flag.tolist() == [bad, K, LABEL_OPS.index("upsample_cross_entropy")]

    args = (logits, labels, weight, *options, True, True)  # as the package calls it
    loss, sums = cuda_kernel("upsample_cross_entropy_reduced").run(*args)
    backward = cuda_kernel("upsample_cross_entropy_gather").run
    grad = backward(torch.ones(()), sums, logits, 20, 23)
    torch.testing.assert_close(grad.double(), right_grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=rf"^labels: upsample_cross_entropy on cpu met {bad} "):
        check_labels()


def main(library: str) -> None:
    load_in_place(library, "_cuda.so")
    ops = torch.ops.mcibi_fast_cuda
    generator = torch.Generator().manual_seed(0)
    K, ignore, smoothing, align_corners = 5, 255, 0.1, True
    logits = torch.randn(2, K, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K + 1, (2, 20, 23), generator=generator)  # K is a bad label
    labels[:, 0] = ignore
    weight = torch.rand(K, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(2, 23, 20, generator=generator, dtype=torch.float64).mT
    flag = torch.zeros(3, dtype=torch.int64)
    bad = int((labels == K).sum())

    exact = logits.clone().requires_grad_()
    upsampled = F.interpolate(exact, (20, 23), mode="bilinear", align_corners=align_corners)
    known = labels.where(labels < K, -1)
    right = F.cross_entropy(
        upsampled, known, weight, ignore_index=-1, label_smoothing=smoothing, reduction="none"
    )
    (right_grad,) = torch.autograd.grad(right, exact, cotangent)
    for layout in (torch.contiguous_format, torch.channels_last):
        flag.zero_()
        options = (weight, ignore, smoothing, align_corners)
        given = logits.contiguous(memory_format=layout)
        losses, statistic = ops.upsample_cross_entropy(given, labels, *options, flag)
        torch.testing.assert_close(losses, right.detach())
        grad = ops.upsample_cross_entropy_backward(cotangent, given, labels, statistic, *options)
        assert grad.stride() == given.stride()
        torch.testing.assert_close(grad, right_grad)
        assert flag.tolist() == [bad, K, LABEL_OPS.index("upsample_cross_entropy")]

    args = (logits, labels, weight, ignore, smoothing, align_corners)
    assert_counted_for_python("upsample_cross_entropy", args, bad, K)

    losses, statistic = ops.upsample_cross_entropy(
        logits.half(), labels.byte(), None, ignore, 0.0, False, flag
    )
    assert losses.dtype == statistic.dtype == torch.float32

    reduced(logits.float(), labels, weight.float(), bad)

    def forward(
        logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, flag: torch.Tensor
    ) -> None:
        ops.upsample_cross_entropy(logits, labels, weight, ignore, 0.0, False, flag)

    def backward(cotangent: torch.Tensor, statistic: torch.Tensor) -> None:
        ops.upsample_cross_entropy_backward(
            cotangent, logits, labels, statistic, None, ignore, 0.0, False
        )

    def one_pass(logits: torch.Tensor, with_grad: bool = True) -> None:
        ops.upsample_cross_entropy_reduced(
            logits, labels, None, ignore, 0.0, False, True, with_grad, flag
        )

    def scaled(grad_loss: torch.Tensor, sums: torch.Tensor, *size: int) -> None:
        ops.upsample_cross_entropy_gather(grad_loss, sums, logits.float(), *size)

    _, sums = ops.upsample_cross_entropy_reduced(
        logits.float(), labels, None, ignore, 0.0, False, True, True, flag
    )
    one = torch.ones(())
    scaled(one, sums, 20, 23)
    for wrong in [
        lambda: one_pass(logits),
        lambda: one_pass(logits.float(), False),
        lambda: one_pass(logits.float().repeat(1, 40, 1, 1)),
        lambda: one_pass(logits.float().repeat(1, 1, 4, 1)),
        lambda: scaled(one, sums[1:], 20, 23),
        lambda: scaled(one, sums.double(), 20, 23),
        lambda: scaled(one, sums, 200, 23),
        lambda: scaled(one.double(), sums, 20, 23),
        lambda: scaled(one.expand(2), sums, 20, 23),
        lambda: forward(logits[0], labels, None, flag),
        lambda: forward(logits, labels[:1], None, flag),
        lambda: forward(logits, labels.float(), None, flag),
        lambda: forward(logits, labels, None, flag[:2]),
        lambda: forward(logits, labels, weight.float(), flag),
        lambda: forward(logits, labels, weight[1:], flag),
        lambda: forward(logits[:, :0], labels, None, flag),
        lambda: backward(cotangent.float(), statistic.double()),
        lambda: backward(cotangent, statistic.double().mT.contiguous().mT),
        lambda: backward(cotangent, statistic.double()[:1]),
        lambda: backward(cotangent, statistic.double()[:, :1]),
    ]:
        try:
            wrong()
        except RuntimeError:
            continue
        raise AssertionError("a wrong argument was taken")


if __name__ == "__main__":
    main(sys.argv[1])
