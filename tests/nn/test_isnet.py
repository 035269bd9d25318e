"""ISNet's contexts: the recorded modules, and regions against a loop over images and classes."""

from __future__ import annotations

import pytest
import torch

from mcibi_fast.nn.within_image.isnet import (
    ISNetContext,
    SemanticLevelContext,
    class_regions,
)


def relative_error(value, expected) -> float:
    expected = torch.as_tensor(expected)
    return float((value - expected).detach().abs().max() / expected.detach().abs().max())


def recorded_module(module, recorded, prefix):
    """The module with the recorded weights, in float64 and evaluation mode."""

    def released(name):
        for ours, theirs in (
            ("attention.output.", "correlate_net.out_project."),
            ("fuse.", "bottleneck."),
            *(
                (f"attention.{kind}.", f"correlate_net.{kind}_project.")
                for kind in ("query", "key", "value")
            ),
        ):
            if name.startswith(ours):
                return f"{prefix}/{theirs}{name.removeprefix(ours)}"
        raise AssertionError(name)

    state = {name: torch.as_tensor(recorded[released(name)]) for name in module.state_dict()}
    assert len(state) == sum(key.startswith(f"{prefix}/") for key in recorded)
    module.load_state_dict(state)
    return module.double().eval()


@torch.no_grad()
def test_recorded_contexts(golden):
    recorded = golden("isnet.npz")
    features, logits = torch.as_tensor(recorded["x"]), torch.as_tensor(recorded["preds"])
    both = ISNetContext(16, 8)
    recorded_module(both.image_level, recorded, "ilc_sd")
    recorded_module(both.semantic_level, recorded, "slc_sd")
    image_level = both.image_level(features)
    assert relative_error(image_level, recorded["feats_il"]) < 1e-10
    assert relative_error(class_regions(features, logits), recorded["slc_region_feats"]) < 1e-10
    semantic_level = both.semantic_level(features, logits, image_level)
    assert relative_error(semantic_level, recorded["feats_sl"]) < 1e-10
    assert relative_error(both(features, logits), recorded["feats_sl"]) < 1e-10


def regions_by_loops(features, logits):
    out = torch.zeros_like(features)
    for b in range(len(features)):
        predicted = logits[b].argmax(0)
        for k in predicted.unique():
            mask = predicted == k
            weights = logits[b, k][mask].softmax(0)
            out[b][:, mask] = (features[b][:, mask] * weights).sum(1, keepdim=True)
    return out


@pytest.mark.parametrize("shape", [(2, 5, 5, 7), (1, 1, 3, 2), (3, 7, 1, 1), (1, 40, 3, 5)])
def test_regions_are_sums_over_each_class(shape, generator):
    B, K, h, w = shape
    features = torch.randn(B, 4, h, w, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    if K > 2:
        logits[:, 1] = -50  # a class that no pixel belongs to
    inputs = [features.requires_grad_(), logits.requires_grad_()]
    cotangent = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    got, expected = class_regions(*inputs), regions_by_loops(*inputs)
    assert relative_error(got, expected) < 1e-12
    gradients = zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    )
    for value, gradient in gradients:
        torch.testing.assert_close(value, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_regions(dtype, generator):
    features = torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 9, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    expected = regions_by_loops(features, logits.double())
    low = regions_by_loops(features.to(dtype), logits)
    got = class_regions(features.to(dtype), logits)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert relative_error(got.double(), expected) <= 2 * relative_error(low.double(), expected)


def test_ties_go_to_the_first_class():
    features = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    logits = torch.tensor([[2.0, 2.0], [2.0, 1.0]]).view(1, 2, 1, 2)
    assert class_regions(features, logits).flatten().tolist() == [2.0, 2.0]


def test_semantic_context_ignores_the_scale_of_other_classes(generator):
    """Only the logits of a pixel's own class weigh it."""
    module = SemanticLevelContext(4, 3).double().eval()
    features, image_level = (
        torch.randn(1, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    logits = torch.rand(1, 3, 5, 6, generator=generator, dtype=torch.float64)
    member = logits == logits.amax(1, keepdim=True)
    lowered = torch.where(member, logits, logits - 7)
    with torch.no_grad():
        expected = module(features, logits, image_level)
        assert torch.equal(module(features, lowered, image_level), expected)
