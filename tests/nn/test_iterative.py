"""Iterative inference: Eq. 17 on probabilities, the released mixing of logits, stages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_fast.models import MCIBIPPHead
from mcibi_fast.nn.iterative import mix_logits, mix_probabilities
from mcibi_fast.nn.within_image import ASPP


def maps(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_equation_17(generator):
    W, O = maps(generator, 2, 5, 3, 4), maps(generator, 2, 5, 3, 4)
    mixed = mix_probabilities(W, O)
    expected = (O.softmax(1) + W.softmax(1)) / 2
    torch.testing.assert_close(mixed.softmax(1), expected)


def test_equation_17_resizes_probabilities_not_logits(generator):
    W, O = maps(generator, 2, 5, 3, 4), 5 * maps(generator, 2, 5, 6, 8)
    resized = F.interpolate(O.softmax(1), (3, 4), mode="bilinear")
    expected = (resized + W.softmax(1)) / 2
    torch.testing.assert_close(mix_probabilities(W, O).softmax(1), expected)


def test_certain_probabilities_are_allowed(generator):
    certain = torch.full((1, 3, 1, 1), -1e4)
    certain[:, 1] = 1e4
    mixed = mix_probabilities(certain, certain)
    assert mixed.softmax(1).flatten().tolist() == [0, 1, 0]


def test_released_mixing(generator):
    W, O = maps(generator, 2, 5, 3, 4), maps(generator, 2, 5, 6, 8)
    resized = F.interpolate(O, (3, 4), mode="bilinear")
    torch.testing.assert_close(mix_logits(W, O), (2 * W + 1.5 * resized) / 2.5)
    torch.testing.assert_close(mix_logits(W, O, weights=(1, 1)), W + resized)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_stages_use_the_first_weights_and_compute_r_once(form, generator):
    head = MCIBIPPHead(5, [8, 12], form=form, feats_channels=16, transform_channels=8)
    head = head.double().eval()
    features = [maps(generator, 2, 8, 3, 4), maps(generator, 2, 12, 3, 4)]
    calls = []
    head.bottleneck.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        third = head(features, stages=3).logits
        assert len(calls) == 1
        first = head(features)
        R = head.pixel_representations(features)
        mix = mix_probabilities if form == "paper" else mix_logits
        logits = first.logits
        for _ in range(2):
            logits = head.decoder(head.context.augment(R, mix(first.weight_logits, logits)))
        assert torch.equal(third, logits)
        assert not torch.equal(third, first.logits)
        again = head(features, previous_logits=head(features, stages=2).logits).logits
        assert torch.equal(third, again)
        head.stages = 3
        assert torch.equal(third, head(features).logits)
        assert torch.equal(head(features, stages=1).logits, first.logits)


def small_head(generator, within, **options):
    """A head in float64 with weights and batch statistics of some size; two feature maps."""
    head = MCIBIPPHead(
        5,
        [8, 12],
        feats_channels=16,
        transform_channels=8,
        within_image=ASPP(12, 16, dilations=(1, 2)) if within else None,
        **options,
    ).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for module in head.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        head.memory.memory.normal_(0.5, 0.5, generator=generator)
    return head.eval(), [maps(generator, 2, 8, 5, 7), maps(generator, 2, 12, 5, 7)]


def from_scratch(head, features, stages, previous=None):
    """The stages as the paper draws them: every one computes everything, nothing is split."""
    context = head.context
    R = head.bottleneck(features[-1])
    within = head.within_image(features[-1]) if head.within_image else None
    W = context.weight_head(R)
    if head.weights_from == "cwi":
        W = head.within_image_head(within)
    mix = mix_probabilities if head.mixing == "paper" else mix_logits
    for _ in range(stages):
        gather = W if previous is None else mix(W, previous)
        C = context.memory.aggregate(gather, hard=context.hard)  # Eq. 12
        if context.downsample is None:
            C = context.attention(R, C)
        else:
            C = context.attention(context.downsample(R), context.downsample(C))
            C = F.interpolate(C, R.shape[2:], mode="bilinear")
        both = torch.cat([R, C], dim=1)
        if hasattr(context.fuse, "conv"):
            augmented = context.fuse.conv(both)
        elif hasattr(context.fuse, "weights"):
            w = context.fuse.weights(both).softmax(1)
            augmented = w[:, :1] * R + w[:, 1:] * C
        else:
            augmented = R + C
        if within is not None:
            augmented = torch.cat([augmented, within], dim=1)
        previous = head.decoder(augmented)
    return previous


VARIANTS = [
    {},
    {"hard": True},
    {"downsample": True},
    {"hard": True, "downsample": True},
    {"fusion": "add"},
    {"fusion": "weighted_add"},
]


@pytest.mark.parametrize("within", [False, True], ids=["fcn", "aspp"])
@pytest.mark.parametrize("projections", ["paper", "released"])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)) or "plain")
@pytest.mark.thinned(together=2)
def test_stages_that_reuse_equal_stages_from_scratch(form, projections, variant, within, generator):
    head, features = small_head(generator, within, form=form, projections=projections, **variant)
    with torch.no_grad():
        for stages in (1, 2, 3):
            expected = from_scratch(head, features, stages)
            error = (head(features, stages=stages).logits - expected).abs().max()
            assert error < 1e-10 * expected.abs().max()
        previous = maps(generator, 2, 5, 10, 14)  # of another size
        expected = from_scratch(head, features, 2, previous)
        got = head(features, previous_logits=previous, stages=2).logits
        assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_stage_computes_only_what_the_weights_change(form, generator):
    head, features = small_head(generator, True, form=form)
    calls = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                calls.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Convolutions():
        head(features, stages=1)
        one = list(calls)
        calls.clear()
        head(features, stages=2)
    for shape in one:
        calls.remove(shape)  # what is left is the second stage
    Z, T, K = 16, 8, 5
    classifier = [(Z, Z, 3, 3), (K, Z, 1, 1)]  # on the context's half alone
    attention = {
        "paper": [(Z, K, 1, 1)],
        "released": [(T, Z, 1, 1), (T, T, 1, 1), (T, Z, 1, 1), (Z, T, 1, 1)],
    }
    assert sorted(calls) == sorted([*attention[form], (Z, Z, 3, 3), *classifier])


def test_training_has_one_stage(generator):
    head = MCIBIPPHead(5, [8, 12], feats_channels=16, transform_channels=8, stages=2, dropout=0.0)
    features = [maps(generator, 2, c, 3, 4).float() for c in (8, 12)]
    calls = []
    head.decoder.register_forward_hook(lambda *_: calls.append(1))
    head.train()(features)
    assert len(calls) == 1
    head.eval()(features)
    assert len(calls) == 3
