"""One overflow must not stay in a memory: a class whose statistics are not finite keeps its row.

Each row that is kept is counted, and all other classes are updated as if nothing had happened.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mcibi_fast
from mcibi_fast import ops
from mcibi_fast.nn import GaussianMemory, RepresentationMemory
from mcibi_fast.nn.clustering import PixelSample

BAD = 2  # the class with an infinite feature
VALUES = [torch.inf, -torch.inf, torch.nan]


@pytest.fixture(autouse=True)
def _counted_from_zero() -> None:
    ops.kept_rows()


def overflowing(
    generator: torch.Generator, value: float = torch.inf, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, the same with one value that is not finite, and labels; class 4 is absent."""
    good = torch.randn(2, 8, 6, 6, generator=generator).to(dtype)
    labels = torch.randint(0, 4, (2, 24, 24), generator=generator)
    labels[0, 8:, 8:] = BAD
    bad = good.clone()
    bad[0, 3, 4, 4] = value
    return good, bad, labels


def gaussian(**options) -> GaussianMemory:
    memory = GaussianMemory(5, 8, **options)
    memory.memory.copy_(torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) + 0.5)
    return memory


def representations(**options) -> RepresentationMemory:
    memory = RepresentationMemory(5, 8, **options)
    memory.memory.copy_(torch.randn(memory.memory.shape, generator=torch.manual_seed(1)))
    return memory


MEMORIES = {
    "gaussian": gaussian,
    "poly": lambda: gaussian(momentum_schedule="poly"),
    "mean": lambda: representations(strategy="mean"),
    "cosine_similarity": representations,
    "two each": lambda: representations(representations=2),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", MEMORIES)
def test_a_class_that_overflows_keeps_its_row(name, value, backend, generator):
    good, bad, labels = overflowing(generator, value, torch.float16)
    memory, usual = MEMORIES[name](), MEMORIES[name]()
    before = memory.memory.clone()
    with mcibi_fast.backend(backend):
        usual.update(good, labels)
        assert ops.kept_rows() == 0
        memory.update(bad, labels)
        assert ops.kept_rows() == 1
        assert ops.kept_rows() == 0  # counted once
        others = [0, 1, 3, 4]
        assert torch.equal(memory.memory[BAD], before[BAD])
        torch.testing.assert_close(memory.memory[others], usual.memory[others])
        assert not torch.equal(memory.memory[0], before[0])
        memory.update(good, labels)  # the next step is as any other
        assert memory.memory.isfinite().all() and not torch.equal(memory.memory[BAD], before[BAD])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_large_finite_features_are_no_overflow(backend, generator):
    good, _, labels = overflowing(generator)
    memory = torch.tensor([[0.0, 1.0]] * 5)
    with mcibi_fast.backend(backend):
        found = ops.memory_update(memory, good * 2.0**100, labels, momentum=1.0)
        expected = ops.memory_update(memory, good, labels, momentum=1.0)
    torch.testing.assert_close(found[:4] / 2.0**100, expected[:4])
    assert ops.kept_rows() == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_row_that_the_memory_cannot_hold_is_kept(backend, generator):
    good, _, labels = overflowing(generator, dtype=torch.float64)
    good[0, :, 3:, 3:] = 1e50  # too large for a memory in float32
    memory = torch.tensor([[0.0, 1.0]] * 5)
    with mcibi_fast.backend(backend):
        found = ops.memory_update(memory, good, labels)
        exact = ops.memory_update(memory.double(), good, labels)
    kept = (exact.abs() > 3e38).any(1)
    assert kept[BAD] and not kept[4]
    assert torch.equal(found[kept], memory[kept])
    torch.testing.assert_close(found[~kept], exact[~kept].float())
    assert ops.kept_rows() == int(kept.sum())


def test_gradients_of_the_other_classes_stay(generator):
    good, bad, labels = overflowing(generator, dtype=torch.float64)
    memory = torch.rand(5, 2, generator=generator, dtype=torch.float64)

    def gradients(features: Tensor) -> tuple[Tensor, ...]:
        features, start = features.clone().requires_grad_(), memory.clone().requires_grad_()
        others = ops.memory_update(start, features, labels)[[0, 1, 3, 4]]
        return torch.autograd.grad(others.square().sum(), (features, start))

    for found, expected in zip(gradients(bad), gradients(good), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "poly", "cosine_similarity"])
def test_in_a_compiled_step(name, generator):
    torch._dynamo.reset()
    _, bad, labels = overflowing(generator)
    memory, usual = MEMORIES[name](), MEMORIES[name]()
    usual.update(bad, labels)
    torch.compile(memory.update, fullgraph=True, backend="aot_eager")(bad, labels)
    torch.testing.assert_close(memory.memory, usual.memory)
    assert ops.kept_rows() == 2


# ---- initialisation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianMemory(5, 8, init="pixel"),
        lambda: RepresentationMemory(5, 8, 2, init="pixel"),
    ],
)
def test_initialisation_waits_for_a_finite_pixel(make, generator):
    good, bad, labels = overflowing(generator)
    labels[1] = labels[1].where(labels[1] != BAD, 0)
    bad[0] = torch.inf
    memory = make()
    before = memory.memory.clone()
    memory.initialize(bad, labels)
    assert torch.equal(memory.memory[BAD], before[BAD]) and not memory.met[BAD]
    assert memory.memory.isfinite().all() and ops.kept_rows() > 0
    while not memory.met[:4].all():
        memory.initialize(good, labels)
    assert memory.memory.isfinite().all()


def test_clusters_are_of_finite_pixels(generator):
    _, bad, labels = overflowing(generator)
    sample = PixelSample(5, 8, per_class=64, per_batch=64)
    sample.add(bad, labels)
    assert all(vectors.isfinite().all() for rows in sample._vectors for vectors in rows)
    assert sample.counts == [sum(map(len, rows)) for rows in sample._vectors]
    assert sample.centres(1).isfinite().all() and sample.counts[BAD] > 0


@pytest.mark.parametrize("make", [GaussianMemory, RepresentationMemory])
def test_centres_that_are_not_finite_set_nothing(make, generator):
    memory = make(5, 8, init="cluster")
    before, centres = memory.memory.clone(), torch.randn(5, 1, 8, generator=generator)
    centres[BAD, 0, 3] = torch.nan
    memory.initialize_from(centres)
    assert torch.equal(memory.memory[BAD], before[BAD]) and not memory.met[BAD]
    assert memory.met[[0, 1, 3, 4]].all() and memory.memory.isfinite().all()
