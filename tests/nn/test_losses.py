"""Losses: mean over valid pixels, all-ignored batches, labels of any dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast.nn import PixelLoss, joint_losses
from mcibi_fast.ops import upsample_cross_entropy


def batch(generator, dtype=torch.float64):
    logits = torch.randn(2, 5, 4, 6, generator=generator, dtype=dtype)
    labels = torch.randint(0, 5, (2, 31, 45), generator=generator)
    labels[:, :7] = 255
    return logits, labels


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_mean_over_valid_pixels(generator, label_dtype, align_corners):
    logits, labels = batch(generator)
    loss = upsample_cross_entropy(logits, labels.to(label_dtype), align_corners=align_corners)
    upsampled = F.interpolate(logits, (31, 45), mode="bilinear", align_corners=align_corners)
    nll = -upsampled.log_softmax(1)
    valid = labels != 255
    picked = nll.gather(1, labels.where(valid, 0)[:, None])[:, 0][valid]
    torch.testing.assert_close(loss, picked.mean(), rtol=1e-12, atol=0)


def test_an_all_ignored_batch_gives_zero_and_no_gradient(generator):
    logits, labels = batch(generator)
    logits.requires_grad_()
    loss = upsample_cross_entropy(logits, torch.full_like(labels, -100), ignore_index=-100)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_summed_in_float32(generator, dtype):
    logits, labels = batch(generator, torch.float32)
    loss = upsample_cross_entropy(logits.to(dtype), labels)
    assert loss.dtype == torch.float32
    expected = upsample_cross_entropy(logits.to(dtype).float(), labels)
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
        expected = weight * upsample_cross_entropy(factor * logits, labels)
        torch.testing.assert_close(terms[name], expected)


def test_bad_labels_and_shapes_are_named(generator):
    logits, labels = batch(generator)
    labels[1, 20, 4] = 200
    with pytest.raises(ValueError, match=r"labels: value 200 at \(b=1, y=20, x=4\).*\[0, 5\)"):
        upsample_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="labels: batch of 1, but logits have a batch of 2"):
        upsample_cross_entropy(logits, labels[:1])


def test_pixel_loss_without_options_is_the_plain_one(generator):
    logits, labels = batch(generator)
    assert torch.equal(PixelLoss()(logits, labels), upsample_cross_entropy(logits, labels))
    assert not PixelLoss().state_dict() and not PixelLoss(class_weights=[1.0]).state_dict()


def test_class_weights_and_label_smoothing(generator):
    logits, labels = batch(generator)
    weights = [0.5, 1.0, 0.0, 2.0, 3.0]
    loss = PixelLoss(class_weights=weights, label_smoothing=0.2).double()
    upsampled = F.interpolate(logits, (31, 45), mode="bilinear")
    expected = F.cross_entropy(
        upsampled,
        labels,
        torch.tensor(weights, dtype=torch.float64),
        ignore_index=255,
        label_smoothing=0.2,
    )
    torch.testing.assert_close(loss(logits, labels), expected)
    labels = labels.to(torch.uint8)
    total = torch.tensor(weights)[labels[labels != 255].long()].sum()
    torch.testing.assert_close(loss.total_weight(labels), total.double())
    assert PixelLoss().total_weight(labels) == (labels != 255).sum()


def ohem(logits, labels, threshold, min_kept, **options):
    """As it is usually written, on upsampled logits and with a sort of the valid pixels."""
    upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    losses = F.cross_entropy(upsampled, labels, ignore_index=255, reduction="none", **options)
    valid = labels != 255
    probability = upsampled.softmax(1).gather(1, labels.where(valid, 0)[:, None])[:, 0][valid]
    hardest = probability.sort().values[min(min_kept, len(probability)) - 1]
    return losses[valid][(probability < threshold) | (probability <= hardest)].mean()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weighted": True}])
@pytest.mark.parametrize(
    ("threshold", "min_kept"), [(0.2, 1), (0.01, 1), (0.01, 700), (0.9, 700), (0.01, 10**6)]
)
def test_ohem(generator, threshold, min_kept, options):
    logits, labels = batch(generator)
    logits.requires_grad_()
    options = dict(options)
    weights = [0.5, 1.0, 0.3, 2.0, 3.0] if options.pop("weighted", False) else None
    loss = PixelLoss(
        ohem_threshold=threshold, ohem_min_kept=min_kept, class_weights=weights, **options
    )
    actual = loss.double()(logits, labels)
    (gradient,) = torch.autograd.grad(actual, logits)
    if weights is not None:
        options["weight"] = loss.class_weights
    expected = ohem(logits, labels, threshold, min_kept, **options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_ohem_keeps_hard_pixels_only(generator):
    logits, labels = batch(generator)
    values = [
        float(PixelLoss(ohem_threshold=threshold, ohem_min_kept=1)(logits, labels))
        for threshold in (0.05, 0.2, 1.0)
    ]
    assert values[0] > values[1] > values[2]
    torch.testing.assert_close(values[2], float(upsample_cross_entropy(logits, labels)))
    empty = PixelLoss(ohem_threshold=0.5)(logits, torch.full_like(labels, 255))
    assert empty == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_weights": [1.0, -1.0]},
            "class_weights: expected finite numbers of at least 0, got",
        ),
        (
            {"class_weights": [1.0, float("nan")]},
            "class_weights: expected finite numbers of at least 0, got",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing: expected at least 0 and less than 1, got 1.0"),
        (
            {"ohem_threshold": 0.0},
            "ohem_threshold: expected a probability above 0, up to 1, got 0.0",
        ),
        ({"ohem_threshold": 0.5, "ohem_min_kept": 0}, "ohem_min_kept: expected at least 1"),
    ],
)
def test_pixel_loss_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PixelLoss(**options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixels_of_weight_zero_alone_give_no_loss(generator, dtype):
    """As ignored ones do; PyTorch's mean would be 0 / 0 and end the training."""
    loss = PixelLoss(class_weights=[0.0, 2.0, 0.0])
    logits = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    labels = torch.zeros(2, 16, 20, dtype=dtype)
    labels[0, :3] = 2
    labels[1, 5:] = 255
    value = loss(logits, labels)
    value.backward()
    assert value == 0 and not logits.grad.any()
    labels[1, 0, 0] = 1  # a single one that counts
    full = F.interpolate(logits, (16, 20), mode="bilinear")
    expected = F.cross_entropy(full, labels.long(), loss.class_weights, ignore_index=255)
    torch.testing.assert_close(loss(logits, labels), expected)
