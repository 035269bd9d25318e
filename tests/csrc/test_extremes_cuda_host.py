"""Numbers of any size on the CUDA kernels, run by the host executor behind the public functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.ops.dispatch import Kernel, _ops, always
from tests.csrc import host_kernels
from tests.csrc.gaussian_aggregate_host import GaussianAggregateHost
from tests.csrc.memory_update_host import MemoryUpdateHost
from tests.csrc.upsample_argmax_host import UpsampleArgmaxHost
from tests.csrc.upsample_cross_entropy_host import UpsampleCrossEntropyHost
from tests.ops import extremes
from tests.ops.table import Case

HOSTS: dict[str, tuple[str, Any]] = {  # op -> folder, launchers
    "upsample_cross_entropy": ("upsample_cross_entropy", UpsampleCrossEntropyHost),
    "upsample_argmax": ("upsample_argmax", UpsampleArgmaxHost),
    "upsample_confusion": ("upsample_argmax", UpsampleArgmaxHost),
    "class_feature_sums": ("memory_update", MemoryUpdateHost),
    "memory_update": ("memory_update", MemoryUpdateHost),
    "gaussian_aggregate": ("gaussian_aggregate", GaussianAggregateHost),
}


@pytest.fixture(scope="module")
def hosts(compile_cache: Path) -> dict[str, Any]:
    """The launchers of each op."""
    launchers = set(HOSTS.values())
    loaded = {folder: of(host_kernels.load(compile_cache, folder)) for folder, of in launchers}
    return {name: loaded[folder] for name, (folder, _) in HOSTS.items()}


@pytest.fixture
def interpolate_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of the same size is copied; PyTorch's CPU kernels multiply by 1 and add 0 times it."""
    interpolate = F.interpolate

    def copying(maps: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        same = tuple(maps.shape[2:]) == tuple(size)
        return maps.clone() if same else interpolate(maps, size, **options)

    monkeypatch.setattr(F, "interpolate", copying)


@pytest.mark.usefixtures("interpolate_as_on_cuda")
@pytest.mark.parametrize(("case", "numbers"), extremes.runs(*HOSTS), ids=str)
def test_numbers_of_any_size(
    case: Case, numbers: str, hosts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = hosts[case.name]
    for name, op in _ops.items():
        if hasattr(host, name):
            kernel = Kernel("cuda", getattr(host, name), always)
            others = [k for k in op.kernels if k.backend != "cuda"]
            monkeypatch.setattr(op, "kernels", (kernel, *others))
    extremes.check(case, numbers, "cuda")
