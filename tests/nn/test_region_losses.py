"""Dice, Lovász and focal losses of segmentation_models_pytorch (tried: 0.6.0)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast import models
from mcibi_fast.nn import PixelLoss, joint_losses
from mcibi_fast.nn.region_losses import region_losses

pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")

K, SIZE = 4, (12, 16)
ALL = {"dice": 1.0, "lovasz": 1.0, "focal": 1.0}


def logits(channels: int = K) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(2, channels, 3, 4, generator=rng, dtype=torch.float64) * 2
    return values.requires_grad_()


def labels(classes: int = K) -> torch.Tensor:
    """Class 1 never occurs (if there are more than two), and some pixels are ignored."""
    rng = torch.Generator().manual_seed(1)
    found = torch.randint(classes, (2, *SIZE), generator=rng)
    if classes > 2:
        found[found == 1] = 0
    found[:, :3] = 255
    return found


def pixels(z: torch.Tensor, y: torch.Tensor, align: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Upsampled logits (N, K) and labels (N,) of the valid pixels alone."""
    full = F.interpolate(z, SIZE, mode="bilinear", align_corners=align)
    valid = y != 255
    return full.movedim(1, -1)[valid], y[valid]


def dice(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if z.shape[1] == 1:
        p, t = z[:, :1].sigmoid(), (y == 1)[:, None]
    else:
        p, t = z.softmax(1), F.one_hot(y, z.shape[1]).bool()
    scores = 2 * (p * t).sum(0) / (p.sum(0) + t.sum(0))
    return ((1 - scores) * t.any(0)).sum() / z.shape[1]


def jaccard(errors: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The Lovász extension of 1 - IoU, by its definition: the sum of its increments."""
    order = errors.argsort(descending=True)
    total, before, wrong = errors.new_zeros(()), 0.0, torch.zeros_like(truth)
    for i in order.tolist():
        wrong[i] = True
        kept, union = int((truth & ~wrong).sum()), int((truth | wrong).sum())
        loss = 1 - kept / union
        total, before = total + errors[i] * (loss - before), loss
    return total


def lovasz(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if z.shape[1] == 1:  # the hinge
        signs = 2.0 * y - 1
        return jaccard((1 - z[:, 0] * signs).relu(), y == 1)
    p = z.softmax(1)
    terms = [
        jaccard(torch.where(y == k, 1 - p[:, k], p[:, k]), y == k)
        for k in range(z.shape[1])
        if (y == k).any()
    ]
    return torch.stack(terms).mean()


def focal(z: torch.Tensor, y: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    classes = [1] if z.shape[1] == 1 else range(z.shape[1])
    total = z.new_zeros(())
    for column, k in enumerate(classes):
        p = z[:, column].sigmoid()
        right = torch.where(y == k, p, 1 - p)
        total = total - ((1 - right) ** gamma * right.log()).mean()
    return total / len(classes)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("channels", [K, 1])
@pytest.mark.parametrize("own", [dice, lovasz, focal], ids=lambda f: f.__name__)
def test_values_and_gradients(own, channels: int, align: bool) -> None:
    z, y = logits(channels), labels(max(channels, 2))
    name = own.__name__
    (found,) = region_losses(z, y.to(torch.uint8), {name: 0.5}, align_corners=align).values()
    expected = 0.5 * own(*pixels(z, y, align))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    (mine,) = torch.autograd.grad(found, z, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_gamma() -> None:
    z, y = logits(), labels()
    found = region_losses(z, y, {"focal": 1.0}, focal_gamma=0.5)["loss_focal"]
    expected = focal(*pixels(z, y, False), gamma=0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_ignored_pixels_have_no_part() -> None:
    """Whatever is predicted there."""
    z, y = logits().detach(), labels()
    full = F.interpolate(z, SIZE, mode="bilinear")
    changed = torch.where((y == 255)[:, None], torch.randn_like(full) * 9, full)
    for name in ALL:
        one, other = (region_losses(v, y, {name: 1.0})[f"loss_{name}"] for v in (full, changed))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels", [K, 1])
def test_nothing_but_ignored_pixels(channels: int) -> None:
    z = logits(channels)
    losses = region_losses(z, torch.full((2, *SIZE), 255), ALL)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == dict.fromkeys(
        ("loss_dice", "loss_lovasz", "loss_focal"), 0.0
    )
    (gradient,) = torch.autograd.grad(sum(losses.values()), z)
    assert (gradient == 0).all()


def test_half_precision_is_widened() -> None:
    z, y = logits().detach().to(torch.bfloat16), labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = region_losses(z, y, ALL)
    exact = region_losses(z.double(), y, ALL)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=1e-5, atol=1e-6)


def test_of_the_prediction_alone() -> None:
    """W and the auxiliary head keep the cross entropy."""
    z, y = logits(), labels()
    others = {"weight_logits": z * 2, "auxiliary_logits": z * 3}
    plain = joint_losses(z, y, **others, loss=PixelLoss())
    both = joint_losses(z, y, **others, loss=PixelLoss(cross_entropy=0.25, dice=2.0))
    assert [*both] == ["loss_cls", "loss_pr", "loss_aux", "loss_dice"]
    torch.testing.assert_close(both["loss_cls"], 0.25 * plain["loss_cls"])
    assert torch.equal(both["loss_pr"], plain["loss_pr"])
    assert torch.equal(both["loss_aux"], plain["loss_aux"])
    expected = 2 * dice(*pixels(z, y, False))
    torch.testing.assert_close(both["loss_dice"].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [3, 1])
def test_in_a_model(classes: int) -> None:
    small = {"backbone": "test_resnet", "feats_channels": 8, "transform_channels": 8}
    loss = PixelLoss(dice=0.5, lovasz=0.5, focal=1.0)
    model = models.create("fcn", classes, memory="mcibipp", loss=loss, **small)
    y = torch.randint(max(classes, 2), (2, 32, 40))
    output = model(torch.randn(2, 3, 32, 40), y)
    assert {"loss_cls", "loss_pr", "loss_dice", "loss_lovasz", "loss_focal"} <= output.losses.keys()
    sum(output.losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_errors() -> None:
    with pytest.raises(ValueError, match="dice: expected a weight of 0 or more, got -1"):
        PixelLoss(dice=-1.0)
    with pytest.raises(ValueError, match="focal_gamma: expected 0 or more"):
        PixelLoss(focal_gamma=float("nan"))
    with pytest.raises(ValueError, match="MaskFormer has losses of its own"):
        models.create("maskformer", 3, "test_resnet", loss=PixelLoss(dice=1.0))
    with pytest.raises(ValueError, match="PointRend has losses of its own"):
        models.create("pointrend", 3, "test_resnet", loss=PixelLoss(cross_entropy=0.5))


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [*sys.modules]:
        if name.partition(".")[0] == "segmentation_models_pytorch":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "mcibi-fast\[losses\]"'):
        region_losses(logits(), labels(), ALL)
    assert region_losses(logits(), labels(), dict.fromkeys(ALL, 0.0)) == {}
