"""Two processes with halves of a batch do what one process does with the whole (gloo, CPU)."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.models.ranks import two_ranks

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What each rank of two ended with, and this process with the whole batch."""
    if not dist.is_gloo_available():
        pytest.skip("needs a PyTorch with gloo")
    folder = tmp_path_factory.mktemp("ranks")
    with two_ranks(WORKER, folder / "rendezvous", folder):
        whole = runpy.run_path(str(WORKER))["run"](0, 1)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
    return {"first": first, "second": second, "whole": whole}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_memory_update_pools_the_batch(results, form):
    key = f"memory_{form}"
    assert torch.equal(results["first"][key], results["second"][key])
    assert relative_error(results["first"][key], results["whole"][key]) < 1e-12


@pytest.mark.parametrize("form", ["paper", "mcibi"])
def test_all_ranks_keep_the_row_that_overflows_on_one(results, form):
    key = f"overflow_{form}"
    assert torch.equal(results["first"][key], results["second"][key])
    assert results["first"][key].isfinite().all()
    assert relative_error(results["first"][key], results["whole"][key]) < 1e-12
    assert results["first"][key][-1] == results["whole"][key][-1] == 1


@pytest.mark.parametrize("form", ["paper", "released", "mcibi"])
def test_whole_model(results, form):
    names = [name for name in results["whole"] if name.startswith(f"{form}.")]
    assert f"{form}.memory" in names
    assert f"{form}.backbone.stage1.0.weight" in names
    for name in names:
        for rank in ("first", "second"):
            assert relative_error(results[rank][name], results["whole"][name]) < 1e-12, name


@pytest.mark.parametrize("name", ["initialized", "representations", "clusters"])
def test_initialization_agrees_on_every_rank(name, results):
    assert torch.equal(results["first"][name], results["second"][name])
    if name == "clusters":
        assert torch.equal(results["first"][name], results["whole"][name])
