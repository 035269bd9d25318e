"""Options of the paper's ablations: the ground truth as weights, schedules, what is updated."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast import models
from mcibi_fast.models import MCIBIPPHead
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.nn.iterative import label_weights

K, Z = 5, 16
TINY = {"backbone": "test_resnet", "feats_channels": Z, "transform_channels": 8}


def batch(generator, size=(40, 48), dtype=torch.float32):
    images = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(0, K, (2, *size), generator=generator)
    labels[:, :3] = 255
    return images, labels


def build(name="fcn_mcibipp", **options):
    return models.create(name, K, **TINY, **options)


# ---- GT-MCIBI++ (Table 1) ------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_label_weights_are_the_label_at_the_centre(dtype, generator):
    labels = torch.randint(0, K, (2, 24, 35), generator=generator)
    labels[:, :8] = 200  # ignored
    labels[0, 12, 3] = 77  # no class
    logits = torch.randn(2, K, 3, 5, generator=generator)
    weights = label_weights(labels.to(dtype), logits, ignore_index=200)
    predicted = logits.argmax(1)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                centre = int(labels[b, 8 * y + 4, 7 * x + 3])
                k = centre if centre < K else int(predicted[b, y, x])
                expected = torch.zeros(K)
                expected[k] = 1
                assert torch.equal(weights[b, :, y, x], expected)
    assert int(labels[0, 12, 3]) == 77 and weights.dtype == logits.dtype
    negative = torch.full((2, 3, 5), -100)
    weights = label_weights(negative, logits, ignore_index=-100)
    assert torch.equal(weights.argmax(1), predicted)
    zero_ignored = label_weights(torch.zeros(2, 3, 5).long(), logits, ignore_index=0)
    assert torch.equal(zero_ignored.argmax(1), predicted)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("name", ["fcn_mcibipp", "pspnet_mcibipp", "fcn_mcibi"])
@torch.no_grad()
def test_the_ground_truth_gathers(name, form, generator):
    """C~_bi is each pixel's class representation, whatever H_pr says."""
    images, labels = batch(generator, dtype=torch.float64)
    model = build(name, weights_from="labels", form=form).double().eval()
    model.memory.memory.normal_(0.5, 0.5, generator=generator)
    assert model.needs_labels and not build(name).needs_labels
    assert not models.create("fcn", K, "test_resnet", feats_channels=8).needs_labels
    head, R = model.head, model.pixel_representations(images)
    weight_logits = head.context.weight_head(R)
    target = F.interpolate(labels[:, None].double(), R.shape[2:], mode="nearest-exact")[:, 0].long()
    target = torch.where(target == 255, weight_logits.argmax(1), target)
    C = model.memory.representations().double()[target].movedim(-1, 1)
    augmented = head.context.fuse.conv(torch.cat([R, head.context.attention(R, C)], dim=1))
    features = model.backbone(images)
    within = head.within_image_context(features, R, weight_logits)
    expected = head.classify(augmented, head.prepare_classifier(features, within))
    out = model(images, labels)
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.weight_logits, weight_logits)
    # Further stages gather with the same labels.
    assert torch.equal(model(images, labels, stages=3).logits, out.logits)
    folded = model.fold()
    torch.testing.assert_close(folded(images, labels).logits, expected, rtol=1e-9, atol=1e-9)
    other = model(images, (labels + 1).clamp(max=K - 1)).logits
    assert not torch.allclose(other, expected)


def test_labels_of_another_size_in_evaluation_alone(generator):
    images, _ = batch(generator)
    labels = torch.randint(0, K, (2, 80, 96), generator=generator)
    model = build(weights_from="labels").eval()
    with torch.no_grad():
        same = model(images, labels[:, ::2, ::2]).logits
        large = model(images, labels[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))
        torch.testing.assert_close(large.logits, same)
    for wrong in (labels[0], labels[:1]):
        with pytest.raises(ValueError, match=r"labels: expected"):
            model(images, wrong)
    with pytest.raises(ValueError, match=r"labels: expected \(2, 40, 48\)"):
        model.train()(images, labels)
    with pytest.raises(ValueError, match=r"labels: expected \(2, 40, 48\)"):
        build().eval()(images, labels)


def test_without_labels_it_says_so(generator):
    images, labels = batch(generator)
    model = build(weights_from="labels")
    for each in (model, model.eval(), model.fold()):
        with pytest.raises(ValueError, match=r"labels: this model gathers with the ground truth"):
            each(images)
    labels[0, 9, 9] = 200
    with pytest.raises(ValueError, match=r"labels: value 200 at \(b=0, y=9, x=9\)"):
        model.train()(images, labels)
    with pytest.raises(ValueError, match=r"weights_from: expected 'auto', .* 'labels', got 'gt'"):
        build(weights_from="gt")


@pytest.mark.parametrize("form", ["paper", "released"])
def test_trains_with_the_ground_truth(form, generator):
    images, labels = batch(generator)
    model = build(weights_from="labels", form=form, dropout=0.0)
    out = model(images, labels)
    sum(out.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(out.losses) == {"loss_cls", "loss_pr", "loss_aux"}


def small_head(**options):
    return MCIBIPPHead(
        K, [8, 12], feats_channels=6, transform_channels=4, dropout=0.0, form="paper", **options
    )


def test_gradient_with_the_ground_truth(generator):
    head = small_head(weights_from="labels", init="standard", noise="fixed").double().eval()
    head.memory.memory.normal_(0.5, 0.5, generator=generator)
    labels = torch.randint(0, K, (1, 12, 12), generator=generator)
    R = torch.rand(1, 6, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = label_weights(labels, R.new_zeros(1, K, 3, 3), ignore_index=255)
    assert head.context.form()[0] == "class-rank"
    assert torch.autograd.gradcheck(lambda R: head.context.augment(R, weights), R)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"weights_from": "labels"}, {"momentum_schedule": "poly"}, {"memory_update": False}]
)
def test_training_compiles_in_one_graph_at_every_step(options, generator):
    features = [torch.randn(2, c, 5, 6, generator=generator) for c in (8, 12)]
    labels = torch.randint(0, K, (2, 40, 48), generator=generator)
    head = small_head(**options).train()
    twin = copy.deepcopy(head)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for step in range(10):  # more than the compilations that PyTorch allows
        for each in (head, twin):
            each.schedule(epoch=0, lr_factor=1 - step / 10)
        got, expected = compiled(features, labels).losses, twin(features, labels).losses
        assert got.keys() == expected.keys() and "loss_cls" in got
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.memory.memory, twin.memory.memory)


# ---- momentum (Table 4), update (Table 3) --------------------------------------


def test_momentum_schedule(generator):
    images, labels = batch(generator)
    poly = build(momentum=0.9, momentum_schedule="poly", dropout=0.0)
    fixed = build(momentum=0.9, dropout=0.0)
    for model in (poly, fixed):
        assert model.memory.momentum == 0.9
        model.schedule(epoch=0, lr_factor=0.25)
    assert (poly.memory.momentum, fixed.memory.momentum) == (0.9 * 0.25, 0.9)
    by_hand = GaussianMemory(K, Z, momentum=0.9 * 0.25)
    labels = labels.where(labels != 2, 255)
    poly(images, labels)
    by_hand.update(poly.pixel_representations(images), labels)
    assert torch.equal(poly.memory.memory[2], torch.tensor([0.0, 1.0]))  # absent: to the bit
    poly.memory.memory.copy_(torch.tensor([0.0, 1.0]))
    R = poly.pixel_representations(images).detach()
    poly.memory.update(R, labels)
    by_hand.memory.copy_(torch.tensor([0.0, 1.0]))
    by_hand.update(R, labels)
    torch.testing.assert_close(poly.memory.memory, by_hand.memory, rtol=1e-6, atol=1e-7)


def test_a_gaussian_that_is_not_updated_still_draws_afresh(generator):
    images, labels = batch(generator)
    model = build(form="paper", memory_update=False, dropout=0.0)
    model.memory.initialize(model.pixel_representations(images).detach(), labels)
    before = model.memory.memory.clone()
    tables = []
    for _ in range(2):
        model(images, labels)
        tables.append(model.memory.representations())
    assert torch.equal(model.memory.memory, before)
    assert not torch.equal(*tables)


# ---- F_T (Table 2) -------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["add", "weighted_add", "concatenation"])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("name", ["fcn_mcibipp", "fcn_mcibi"])
def test_every_fusion_trains_and_folds(name, form, fusion, generator):
    images, labels = batch(generator)
    model = build(name, fusion=fusion, form=form, dropout=0.0)
    sum(model(images, labels).losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.double().eval()
    with torch.no_grad():
        expected = model(images.double(), stages=2).logits
        got = model.fold()(images.double(), stages=2).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-10
