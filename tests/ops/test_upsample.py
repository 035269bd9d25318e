"""The upsampling ops as what they stand in for in other people's code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mcibi_fast
from mcibi_fast import ops
from tests.ops.table import label_map, randn

BACKENDS = ("auto", "reference")


def test_they_are_exported_at_the_top() -> None:
    for name in ("upsample_cross_entropy", "upsample_argmax", "upsample_confusion"):
        assert getattr(mcibi_fast, name) is getattr(ops, name)
        assert name in mcibi_fast.__all__


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_is_a_drop_in(
    backend: str, align_corners: bool, reduction: str, generator: torch.Generator
) -> None:
    logits = randn(generator, 2, 7, 5, 6).requires_grad_()
    labels = label_map(generator, (2, 33, 41), 7)
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": 0.2, "reduction": reduction}
    up = F.interpolate(logits, (33, 41), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(up, labels, ignore_index=255, **options)
    with mcibi_fast.backend(backend):
        result = ops.upsample_cross_entropy(logits, labels, align_corners=align_corners, **options)
        grads = [torch.autograd.grad(r.sum(), logits)[0] for r in (result, expected)]
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduced_losses_of_16_bit_logits_are_float32(
    backend: str, generator: torch.Generator
) -> None:
    logits = randn(generator, 1, 7, 5, 6, dtype=torch.bfloat16)
    labels = label_map(generator, (1, 33, 41), 7)
    with mcibi_fast.backend(backend):
        for reduction in ("none", "sum", "mean"):
            result = ops.upsample_cross_entropy(logits, labels, reduction=reduction)
            wide = ops.upsample_cross_entropy(logits.float(), labels, reduction=reduction)
            assert result.dtype == torch.float32
            assert torch.equal(result, wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_examples_by_pixel(backend: str, generator: torch.Generator) -> None:
    """Online hard example mining: the gradient of the losses above a threshold alone."""
    logits = randn(generator, 2, 7, 5, 6).requires_grad_()
    labels = label_map(generator, (2, 33, 41), 7)
    up = F.interpolate(logits, (33, 41), mode="bilinear")
    expected = F.cross_entropy(up, labels, ignore_index=255, reduction="none")
    with mcibi_fast.backend(backend):
        losses = ops.upsample_cross_entropy(logits, labels, reduction="none")
        grads = [torch.autograd.grad(l[l > 2].mean(), logits)[0] for l in (losses, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_argmax_and_confusion_of_logits_with_a_gradient(
    backend: str, generator: torch.Generator
) -> None:
    logits = randn(generator, 2, 7, 5, 6).requires_grad_()
    labels = label_map(generator, (2, 33, 41), 7)
    expected = F.interpolate(logits, (33, 41), mode="bilinear").argmax(1)
    with mcibi_fast.backend(backend):
        assert torch.equal(ops.upsample_argmax(logits, (33, 41)), expected)
        assert torch.equal(ops.upsample_argmax(logits, labels.shape[1:]), expected)
        counts = ops.upsample_confusion(logits, labels, 7)
    pairs = torch.stack([labels, expected])[:, labels != 255]
    for row, column in ((0, 0), (3, 5), (6, 2)):
        assert counts[row, column] == ((pairs[0] == row) & (pairs[1] == column)).sum()
    assert counts.sum() == pairs.shape[1]
