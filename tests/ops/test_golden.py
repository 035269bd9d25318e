"""The ops against what the released code gave for the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mcibi_fast
from mcibi_fast import ops

BACKENDS = ("auto", "reference")


def close(result: torch.Tensor, recorded: np.ndarray) -> None:
    """Largest error over largest value below 1e-10."""
    truth = torch.from_numpy(recorded)
    assert (result - truth).abs().max() <= 1e-10 * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_memory_after_each_update(golden, backend: str, align_corners: bool) -> None:
    data = golden("update.npz")
    memory = torch.from_numpy(data["memory0"])
    with mcibi_fast.backend(backend):
        for step in range(2):
            memory = ops.memory_update(
                memory,
                torch.from_numpy(data["feats8"][step]),
                torch.from_numpy(data["labels"][step]),
                momentum=0.1,
                unbiased=True,
                ignore_index=-100,
                align_corners=align_corners,
            )
            close(memory, data[f"memory_ac{int(align_corners)}"][step])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_class_means(golden, backend: str, align_corners: bool) -> None:
    data = golden("update.npz")
    features, labels = torch.from_numpy(data["feats8"][0]), torch.from_numpy(data["labels"][0])
    with mcibi_fast.backend(backend):
        sums, counts = ops.class_feature_sums(
            features, labels, 7, ignore_index=-100, align_corners=align_corners
        )
    recorded = data[f"class_mean_step0_ac{int(align_corners)}"]
    present = ~np.isnan(recorded).any(1)
    np.testing.assert_array_equal(counts.numpy() > 0, present)
    close((sums / counts.unsqueeze(1))[torch.from_numpy(present)], recorded[present])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_are_no_multiples(golden, backend: str) -> None:
    data = golden("update.npz")
    memory = torch.from_numpy(data["memory0"])
    with mcibi_fast.backend(backend):
        for step in range(2):
            memory = ops.memory_update(
                memory,
                torch.from_numpy(data["feats8"][step])[..., :5, :7],
                torch.from_numpy(data["labels"][step])[:, :37, :50],
                unbiased=True,
                ignore_index=-100,
            )
            close(memory, data["memory_nonsquare_5x7_to_37x50"][step])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [16, 512])
def test_table_is_equal_bit_for_bit(golden, backend: str, channels: int) -> None:
    data = golden("gaussian_table.npz")
    recorded = torch.from_numpy(data[f"table_Z{channels}"])
    if channels == 16:
        eps = torch.from_numpy(data["eps_K5_Z16"])
    else:
        eps = torch.from_numpy(golden("eps_K182_Z512.npz")["eps"])[:5]
    with mcibi_fast.backend(backend):
        table = ops.gaussian_table(torch.from_numpy(data["memory"]), channels, noise=eps)
    assert torch.equal(table, recorded)
