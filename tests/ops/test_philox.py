"""The counter-based noise: known answers, statistics, and what it depends on."""

from __future__ import annotations

import pytest
import torch

import mcibi_fast
from mcibi_fast import ops
from mcibi_fast.ops.gaussian_aggregate.reference import philox4x32_10, philox_normal

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0x0] * 4, [0x0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], result: list[int]) -> None:
    assert philox4x32_10(torch.tensor(counter), torch.tensor(key)).tolist() == result


def unit_memory(num_classes: int) -> torch.Tensor:
    return torch.tensor([[0.0, 1.0]]).repeat(num_classes, 1)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5])
@pytest.mark.parametrize("step", [0, 3, 2**31 + 1])
def test_backends_agree_to_2e_6(seed: int, step: int) -> None:
    noise = ops.Philox(torch.tensor([seed, step]))
    table = ops.gaussian_table(unit_memory(37), 131, noise=noise)
    with mcibi_fast.backend("reference"):
        truth = ops.gaussian_table(unit_memory(37), 131, noise=noise)
    assert (table - truth).abs().max() <= 2e-6


def test_numbers_are_standard_normal() -> None:
    eps = philox_normal(64, 4096, torch.tensor([123, 0])).double()
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5
    assert abs(eps.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs((eps.abs() < 1).double().mean() - 0.682689) < 4 * (0.2166 / n) ** 0.5
    # Neighbours in channel, in class, and within a Box-Muller pair are uncorrelated.
    for a, b in ((eps[:, 1:], eps[:, :-1]), (eps[1:], eps[:-1]), (eps[:, 0::2], eps[:, 1::2])):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_a_number_depends_on_seed_step_class_and_channel_alone() -> None:
    state = torch.tensor([5, 9])
    eps = philox_normal(6, 40, state)
    assert torch.equal(philox_normal(3, 17, state), eps[:3, :17])
    for other in ([6, 9], [5, 10], [5 + 2**32, 9]):
        assert not torch.equal(philox_normal(6, 40, torch.tensor(other)), eps)


def test_state_advanced_in_place_changes_the_draw_but_not_a_pending_backward() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    memory, state = unit_memory(3), torch.tensor([1, 0])
    want = torch.autograd.grad(
        ops.gaussian_aggregate(logits, memory, 8, noise=ops.Philox(state.clone())).square().sum(),
        logits,
    )
    out = ops.gaussian_aggregate(logits, memory, 8, noise=ops.Philox(state)).square().sum()
    state += 1
    memory += 1
    torch.testing.assert_close(torch.autograd.grad(out, logits), want)


@pytest.mark.parametrize("state", [torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0])])
def test_wrong_state_is_refused(state: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="state: expected an int64 tensor of 2 elements"):
        ops.Philox(state)
