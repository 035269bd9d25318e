"""Losses: mean over valid pixels, all-ignored batches, labels of any dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast.nn import joint_losses, upsampled_cross_entropy


def batch(generator, dtype=torch.float64):
    logits = torch.randn(2, 5, 4, 6, generator=generator, dtype=dtype)
    labels = torch.randint(0, 5, (2, 31, 45), generator=generator)
    labels[:, :7] = 255
    return logits, labels


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_mean_over_valid_pixels(generator, label_dtype, align_corners):
    logits, labels = batch(generator)
    loss = upsampled_cross_entropy(logits, labels.to(label_dtype), align_corners=align_corners)
    upsampled = F.interpolate(logits, (31, 45), mode="bilinear", align_corners=align_corners)
    nll = -upsampled.log_softmax(1)
    valid = labels != 255
    picked = nll.gather(1, labels.where(valid, 0)[:, None])[:, 0][valid]
    torch.testing.assert_close(loss, picked.mean(), rtol=1e-12, atol=0)


def test_an_all_ignored_batch_gives_zero_and_no_gradient(generator):
    logits, labels = batch(generator)
    logits.requires_grad_()
    loss = upsampled_cross_entropy(logits, torch.full_like(labels, -100), ignore_index=-100)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_summed_in_float32(generator, dtype):
    logits, labels = batch(generator, torch.float32)
    loss = upsampled_cross_entropy(logits.to(dtype), labels)
    assert loss.dtype == torch.float32
    expected = upsampled_cross_entropy(logits.to(dtype).float(), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_joint_losses_are_weighted(generator):
    logits, labels = batch(generator)
    terms = joint_losses(
        logits,
        labels,
        weight_logits=2 * logits,
        auxiliary_logits=3 * logits,
        alpha=0.3,
        auxiliary_weight=0.7,
    )
    assert list(terms) == ["loss_cls", "loss_pr", "loss_aux"]
    for name, weight, factor in (("loss_cls", 1, 1), ("loss_pr", 0.3, 2), ("loss_aux", 0.7, 3)):
        expected = weight * upsampled_cross_entropy(factor * logits, labels)
        torch.testing.assert_close(terms[name], expected)


def test_bad_labels_and_shapes_are_named(generator):
    logits, labels = batch(generator)
    labels[1, 20, 4] = 200
    with pytest.raises(ValueError, match=r"labels: value 200 at \(b=1, y=20, x=4\).*\[0, 5\)"):
        upsampled_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="labels: batch of 1, but logits have a batch of 2"):
        upsampled_cross_entropy(logits, labels[:1])
