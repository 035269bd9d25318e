"""Initialisation by clustering: sampled pixels, clusters, what the memories make of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast.nn import GaussianMemory, RepresentationMemory
from mcibi_fast.nn.bilinear import pixels
from mcibi_fast.nn.clustering import PixelSample, spherical_centres


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "full"), [((5, 7), (23, 31)), ((4, 4), (4, 4)), ((7, 1), (3, 9))])
def test_pixels_are_those_of_the_upsampled_features(size, full, align_corners, generator):
    features = torch.randn(2, 6, *size, generator=generator, dtype=torch.float64)
    labels = torch.zeros(2, *full)
    positions = torch.randint(labels.numel(), (40,), generator=generator)
    upsampled = F.interpolate(features, full, mode="bilinear", align_corners=align_corners)
    expected = upsampled.movedim(1, -1).flatten(0, 2)[positions]
    got = pixels(features, labels, positions, align_corners)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_sample_is_bounded_and_of_the_right_classes(generator):
    """Each class's features are its index, so that a pixel shows its class."""
    labels = torch.randint(0, 4, (2, 12, 10), generator=generator)
    labels[labels == 2] = 255
    labels[0, 3, 3:6] = 3
    labels = labels.where(labels != 3, 0)
    labels[0, 3, 3:6] = 3
    features = labels[:, None].float().expand(-1, 8, -1, -1)
    sample = PixelSample(4, 8, per_class=50, per_batch=20)
    for expected in ([20, 20, 0, 3], [40, 40, 0, 6], [50, 50, 0, 9], [50, 50, 0, 12]):
        sample.add(features, labels)
        assert sample.counts == expected
    for k, vectors in enumerate(sample._vectors):
        assert all((v == k).all() and v.dtype == torch.float32 for v in vectors)
    centres = sample.centres(1)
    assert centres.shape == (4, 1, 8)
    torch.testing.assert_close(centres[3, 0], torch.full((8,), 3.0))
    assert not centres[2].any()


def test_sample_repeats_and_leaves_the_global_generators_alone(generator):
    features = torch.randn(2, 8, 6, 5, generator=generator)
    labels = torch.randint(0, 3, (2, 24, 20), generator=generator)
    state = torch.get_rng_state()

    def centres(seed):
        sample = PixelSample(3, 8, per_class=60, per_batch=30, seed=seed)
        for _ in range(2):
            sample.add(features, labels)
        return sample.centres(2)

    first = centres(0)
    assert torch.equal(first, centres(0))
    assert not torch.equal(first, centres(1))
    assert torch.equal(state, torch.get_rng_state())


def bundle(direction, lengths, generator):
    noise = 0.02 * torch.randn(len(lengths), len(direction), generator=generator)
    return F.normalize(F.normalize(direction, dim=0) + noise, dim=1) * lengths[:, None]


def test_clusters_are_directions_whatever_the_lengths(generator):
    """Euclidean clusters would part the short from the long vectors."""
    a, b = torch.eye(6)[0], torch.eye(6)[3]
    lengths = torch.tensor([0.1, 10.0]).repeat(15)
    vectors = torch.cat([bundle(a, lengths, generator), bundle(b, lengths[:20], generator)])
    vectors = vectors[torch.randperm(50, generator=generator)]
    centres = spherical_centres(vectors, 2)
    assert F.cosine_similarity(centres[0], a, dim=0) > 0.999  # the larger first
    assert F.cosine_similarity(centres[1], b, dim=0) > 0.999
    torch.testing.assert_close(centres.norm(dim=1), torch.full((2,), 5.05), rtol=1e-5, atol=0)


def test_one_cluster_is_the_mean_direction_at_the_mean_length(generator):
    vectors = torch.rand(30, 6, generator=generator, dtype=torch.float64)
    expected = F.normalize(F.normalize(vectors, dim=1).mean(0), dim=0) * vectors.norm(dim=1).mean()
    torch.testing.assert_close(spherical_centres(vectors, 1), expected[None])


def test_fewer_directions_than_clusters():
    vectors = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0]])
    centres = spherical_centres(vectors, 3)
    torch.testing.assert_close(centres, torch.tensor([[2.0, 0], [0, 1]]))
    assert not spherical_centres(torch.zeros(4, 2), 2).any()


def test_gaussian_takes_the_statistics_of_the_centre(generator):
    centres = torch.randn(4, 1, 8, generator=generator)
    centres[1] = 0
    memory = GaussianMemory(4, 8, form="paper", init="cluster")
    assert not memory.met.any()
    memory.initialize_from(centres)
    assert memory.met.tolist() == [True, False, True, True]
    for k in (0, 2, 3):
        expected = torch.stack([centres[k, 0].mean(), centres[k, 0].std(correction=0)])
        torch.testing.assert_close(memory.memory[k], expected)
    assert memory.memory[1].tolist() == [0, 1]
    before = memory.memory.clone()
    memory.initialize_from(centres + 1)
    assert torch.equal(memory.memory[[0, 2, 3]], before[[0, 2, 3]])
    assert memory.met.all()
    released = GaussianMemory(4, 8, init="cluster")
    released.initialize_from(centres)
    torch.testing.assert_close(released.memory[0, 1], centres[0, 0].std())
    with pytest.raises(ValueError, match=r"centres: expected \(4, 1, 8\), got \(4, 2, 8\)"):
        memory.initialize_from(torch.zeros(4, 2, 8))


def test_representations_are_the_centres(generator):
    centres = torch.randn(4, 3, 8, generator=generator)
    centres[1] = 0
    centres[2, 2] = 0
    memory = RepresentationMemory(4, 8, 3, init="cluster")
    memory.initialize_from(centres)
    assert torch.equal(memory.memory, centres)
    assert memory.met.tolist() == [True, False, False, True]
    memory.initialize_from(centres + 1)
    assert torch.equal(memory.memory[[0, 3]], centres[[0, 3]])
    assert memory.met.all()
    with pytest.raises(ValueError, match=r"centres: expected \(4, 3, 8\)"):
        memory.initialize_from(centres[:, :1])


@pytest.mark.parametrize("n", [1, 3])
def test_representations_from_one_pixel_each(n, generator):
    features = torch.randn(2, 8, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 20, 24), generator=generator)
    labels[labels == 2] = 255
    upsampled = F.interpolate(features, (20, 24), mode="bilinear").movedim(1, -1)
    memory = RepresentationMemory(4, 8, n, init="pixel").double()
    assert not memory.met.any()
    memory.initialize(features, labels)
    assert memory.met.tolist() == [True, True, False, True]
    for k in (0, 1, 3):
        rows = upsampled[labels == k]
        distances = (rows[:, None] - memory.memory[k]).abs().amax(2)
        assert (distances.min(0).values < 1e-12).all()
        assert len(memory.memory[k].unique(dim=0)) == n
    before = memory.memory.clone()
    memory.initialize(features, labels)
    assert torch.equal(memory.memory, before)
