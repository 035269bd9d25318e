"""What test_distributed.py runs in one process and in several.

Arguments of a process: rank, number of processes, rendezvous file, folder for the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mcibi_fast import ops
from mcibi_fast.models import MCIBIHead, MCIBIPPHead, Segmentor
from mcibi_fast.nn import GaussianMemory, RepresentationMemory, conv_bn_relu
from mcibi_fast.training.processes import leave_group

K = 5
SHARES = {1: [slice(0, 4)], 2: [slice(0, 1), slice(1, 4)]}  # of a batch of four, unequal


def run(rank: int, world: int) -> dict[str, torch.Tensor]:
    """The memories and weights that this rank ends with."""
    results = {}
    for form in ("paper", "released"):
        results[f"memory_{form}"] = updated_memory(form, SHARES[world][rank])
        results.update(trained_model(form, rank, world))
    results.update(trained_model("mcibi", rank, world))
    for form in ("paper", "mcibi"):
        results[f"overflow_{form}"] = overflown_memory(form, SHARES[world][rank])
    results["initialized"] = initialized_memory(SHARES[world][rank])
    results["representations"] = initialized_representations(SHARES[world][rank])
    results["clusters"] = clustered_memory(rank)
    return results


def updated_memory(form: str, share: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    memory = GaussianMemory(K, 8, form=form).double()
    for _ in range(3):
        features = torch.randn(4, 8, 5, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, K - 1, (4, 20, 24), generator=generator)
        labels[0, 0] = 255
        labels[3, 5, 5:8] = K - 1  # on one rank alone
        memory.update(features[share], labels[share])
    assert memory.noise_state.tolist() == [0, 4]
    return memory.memory


def overflown_memory(form: str, share: slice) -> torch.Tensor:
    """The memory after a step with an infinity on one rank, and how many rows were kept."""
    generator = torch.Generator().manual_seed(4)
    mcibi = form == "mcibi"
    memory = (RepresentationMemory(K, 8) if mcibi else GaussianMemory(K, 8, form="paper")).double()
    memory.memory.copy_(torch.randn(memory.memory.shape, generator=generator).double())
    features = torch.randn(4, 8, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K - 1, (4, 20, 24), generator=generator)
    labels[0, :10] = K - 1  # on the first rank; the labels of the last rows are of other classes
    features[0, 2, 0, 0] = torch.inf
    ops.kept_rows()
    memory.update(features[share], labels[share])
    return torch.cat([memory.memory.flatten(), torch.tensor([float(ops.kept_rows())])])


def initialized_memory(share: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    memory = GaussianMemory(K, 8, form="paper").double()
    features = torch.randn(4, 8, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K - 1, (4, 20, 24), generator=generator)
    labels[3, 5, 5:8] = K - 1
    memory.initialize(features[share], labels[share])
    assert memory.met.all()
    return memory.memory


def initialized_representations(share: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    memory = RepresentationMemory(K, 8, 2, init="pixel").double()
    features = torch.randn(4, 8, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K - 1, (4, 20, 24), generator=generator)
    labels[3, 5, 5:8] = K - 1
    memory.initialize(features[share], labels[share])
    assert memory.met.all()
    return memory.memory


def clustered_memory(rank: int) -> torch.Tensor:
    """Rank 0's centres, whatever the others found."""
    centres = torch.randn(K, 2, 8, generator=torch.Generator().manual_seed(rank))
    memory, gaussian = RepresentationMemory(K, 8, 2), GaussianMemory(K, 8, init="cluster")
    memory.initialize_from(centres)
    gaussian.initialize_from(centres[:, :1])
    return torch.cat([memory.memory.flatten(), gaussian.memory.flatten()])


class TinyBackbone(nn.Module):
    """Two stages, without the seconds that importing timm takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = conv_bn_relu(3, 8, 3, stride=4)
        self.stage2 = conv_bn_relu(8, 12, 3, stride=2)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        first = self.stage1(images)
        return [first, self.stage2(first)]


def trained_model(form: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Three steps with batch norm frozen and no dropout; every pixel counts on every rank."""
    generator = torch.Generator().manual_seed(3)
    options = {"feats_channels": 16, "transform_channels": 8, "dropout": 0.0}
    if form == "mcibi":
        head = MCIBIHead(K, [8, 12], form="released", **options)
    else:
        head = MCIBIPPHead(K, [8, 12], form=form, **options)
    model = Segmentor(TinyBackbone(), head).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter[0].numel()
            parameter.copy_(2 * noise / fan_in**0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    runner = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    share = slice(4 * rank // world, 4 * (rank + 1) // world)
    for step in range(3):
        model.schedule(epoch=step, lr_factor=1 - step / 3)
        images = torch.randn(4, 3, 24, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, K, (4, 24, 32), generator=generator)
        optimizer.zero_grad()
        sum(runner(images[share], labels[share]).losses.values()).backward()
        optimizer.step()
    trained = dict(model.named_parameters()) | {"memory": model.memory.memory}
    return {f"{form}.{name}": value.detach() for name, value in trained.items()}


def main(run: Callable[[int, int], object]) -> None:
    """Runs it as one process of a group, by this script's arguments, and saves what it returns."""
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world
    )
    torch.save(run(rank, world), Path(sys.argv[4]) / f"rank{rank}.pt")
    leave_group()


if __name__ == "__main__":
    main(run)
