"""The memories that the paper does not have: a Gaussian per channel, and learnt vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast import ops
from mcibi_fast.nn import DatasetLevelContext, DiagonalMemory, GaussianMemory, LearntMemory


def batch(generator, *, classes=5, channels=8, dtype=torch.float64):
    features = torch.randn(2, channels, 6, 7, generator=generator, dtype=dtype)
    labels = torch.randint(0, classes, (2, 24, 28), generator=generator)
    labels[:, :5] = 255
    return features, labels


def pixels_of(features, labels, k):
    """What each labelled pixel of a class takes from the cells: (P, cells), by the transpose."""
    cells = features.shape[2] * features.shape[3]
    unit = torch.eye(cells, dtype=features.dtype).view(cells, 1, *features.shape[2:])
    taken = F.interpolate(unit, labels.shape[1:], mode="bilinear")[:, 0]  # (cells, H, W)
    rows = [
        taken[:, image == k].T @ m.flatten(1).T for image, m in zip(labels, features, strict=True)
    ]
    squares = [
        taken[:, image == k].T @ m.flatten(1).T ** 2
        for image, m in zip(labels, features, strict=True)
    ]
    return torch.cat(rows), torch.cat(squares)


@pytest.mark.parametrize("ignored", [255, 3])
def test_diagonal_update_is_the_mean_and_the_deviation_of_each_channel(generator, ignored):
    memory = DiagonalMemory(6, 8, momentum=0.3, ignore_index=ignored).double()
    features, labels = batch(generator)  # class 5 is absent
    labels = labels.where(labels != 255, ignored)
    memory.update(features, labels)
    for k in range(6):
        start = torch.tensor([[0.0], [1.0]]).double().expand(2, 8)
        if k in (ignored, 5):
            assert torch.equal(memory.memory[k], start)
            continue
        rows, squares = pixels_of(features, labels, k)
        mean = rows.mean(0)
        std = (squares.mean(0) - mean**2).sqrt()
        expected = 0.7 * start + 0.3 * torch.stack([mean, std])
        torch.testing.assert_close(memory.memory[k], expected, rtol=1e-10, atol=1e-10)


def test_diagonal_deviation_of_features_in_labels_size_is_that_of_the_pixels(generator):
    memory = DiagonalMemory(3, 4, momentum=1.0).double()
    features = torch.randn(1, 4, 9, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 9, 11), generator=generator)
    memory.update(features, labels)
    for k in range(3):
        pixels = features[0][:, labels[0] == k]
        torch.testing.assert_close(memory.memory[k, 0], pixels.mean(1))
        torch.testing.assert_close(memory.memory[k, 1], pixels.std(1, correction=0))


@pytest.mark.parametrize("noise", ["released", "fixed", "fresh"])
def test_diagonal_representations_are_mean_plus_deviation_times_the_noise_of_the_scalar_memory(
    generator, noise
):
    memory = DiagonalMemory(5, 16, noise=noise, seed=3)
    scalar = GaussianMemory(5, 16, noise=noise, seed=3)  # mean 0, deviation 1: the noise itself
    memory.memory.copy_(torch.randn(5, 2, 16, generator=generator))
    drawn = memory.memory[:, 0] + memory.memory[:, 1] * scalar.representations()
    assert torch.equal(memory.representations(), drawn)
    logits = torch.randn(2, 5, 3, 4, generator=generator)
    mixed = torch.einsum("bkhw,kz->bzhw", logits.softmax(1), drawn)
    torch.testing.assert_close(memory.aggregate(logits), mixed)
    hard = memory.aggregate(logits, hard=True)
    torch.testing.assert_close(hard, drawn[logits.argmax(1)].permute(0, 3, 1, 2))


def test_diagonal_fresh_noise_differs_between_training_steps_only(generator):
    memory = DiagonalMemory(5, 8, noise="fresh", momentum=0.0)
    features, labels = batch(generator, dtype=torch.float32)
    first = memory.representations()
    memory.update(features, labels)
    assert not torch.equal(first, memory.representations())
    memory.eval()
    fixed = memory.representations()
    memory.update(features, labels)
    assert torch.equal(fixed, memory.representations())


def test_diagonal_pixel_initialisation_copies_one_pixel_of_each_class(generator):
    memory = DiagonalMemory(4, 8, init="pixel").double()
    assert not memory.met.any()
    features = torch.randn(2, 8, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 6, 7), generator=generator)  # class 3 is absent
    memory.initialize(features, labels)
    assert memory.met.tolist() == [True, True, True, False]
    for k in range(3):
        mean, std = memory.memory[k]
        assert (features.permute(0, 2, 3, 1)[labels == k] - mean).abs().sum(1).min() < 1e-12
        assert not std.any()
    before = memory.memory.clone()
    memory.initialize_from(torch.ones(4, 1, 8).double())
    assert torch.equal(memory.memory[:3], before[:3])
    assert torch.equal(memory.memory[3, 0], torch.ones(8).double())
    with pytest.raises(ValueError, match=r"centres: expected \(4, 1, 8\)"):
        memory.initialize_from(torch.ones(4, 8))


def test_diagonal_keeps_rows_whose_features_are_not_finite(generator):
    memory = DiagonalMemory(5, 8)
    features, labels = batch(generator, dtype=torch.float32)
    features[:, 0] = torch.inf
    ops.kept_rows()
    before = memory.memory.clone()
    memory.update(features, labels)
    assert torch.equal(memory.memory, before)
    assert ops.kept_rows() == 5


def test_diagonal_state_dict_and_reset(generator):
    memory, other = DiagonalMemory(5, 8), DiagonalMemory(5, 8)
    memory.update(*batch(generator, dtype=torch.float32))
    assert list(memory.state_dict()) == ["memory"]
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.representations(), memory.representations())
    assert other.half().memory.dtype == torch.float32
    other.reset_parameters()
    assert torch.equal(other.memory, DiagonalMemory(5, 8).memory)
    fixed = DiagonalMemory(5, 8, fixed=True)
    fixed.update(*batch(generator, dtype=torch.float32))
    assert torch.equal(fixed.memory, other.memory)


@pytest.mark.parametrize("projections", ["released", "paper"])
def test_learnt_vectors_get_the_gradient_of_what_pixels_gather(generator, projections):
    memory = LearntMemory(5, 8, seed=1).double()
    context = DatasetLevelContext(memory, transform_channels=8, projections=projections).double()
    features, labels = batch(generator)
    context.eval()

    def gathered(vectors):
        memory.memory.data.copy_(vectors)
        return context(features).features.square().sum()

    start = memory.memory.detach().clone()
    gathered(start).backward()
    direction = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        numeric = (gathered(start + 1e-6 * direction) - gathered(start - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((memory.memory.grad * direction).sum(), numeric, rtol=1e-6, atol=0)
    memory.memory.data.copy_(start)
    memory.update(features, labels)  # statistics change nothing
    assert torch.equal(memory.memory, start)


def test_learnt_vectors_depend_on_their_seed_only(generator):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = LearntMemory(5, 8), LearntMemory(5, 8), LearntMemory(5, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.memory, same.memory) and not torch.equal(one.memory, other.memory)
    assert list(one.state_dict()) == ["memory"] and one.met.all()
    assert not LearntMemory(5, 8, fixed=True).memory.requires_grad
    logits = torch.randn(2, 5, 3, 4, generator=generator)
    mixed = torch.einsum("bkhw,kz->bzhw", logits.softmax(1), one.memory)
    torch.testing.assert_close(one.aggregate(logits), mixed)
    rows = one.memory[logits.argmax(1)].permute(0, 3, 1, 2)
    assert torch.equal(one.aggregate(logits, hard=True), rows)
