"""Iterative inference: Eq. 17 on probabilities, the released mixing of logits, stages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast.models import MCIBIPPHead
from mcibi_fast.models.iterative import mix_logits, mix_probabilities


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


def test_training_has_one_stage(generator):
    head = MCIBIPPHead(5, [8, 12], feats_channels=16, transform_channels=8, stages=2, dropout=0.0)
    features = [maps(generator, 2, c, 3, 4).float() for c in (8, 12)]
    calls = []
    head.decoder.register_forward_hook(lambda *_: calls.append(1))
    head.train()(features)
    assert len(calls) == 1
    head.eval()(features)
    assert len(calls) == 3
