"""Small models of the peers, and what test_peers.py runs in one process and in two.

Arguments of a process: rank, number of processes, rendezvous file, folder for the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mcibi_fast import models
from mcibi_fast.models import Segmentor
from tests import thinning
from tests.models.distributed_worker import main
from tests.models.stub_backbone import PEERS, Stub

K, Z = 5, 16
# A framework, and after a space its form if it has several.
FORMS = [*PEERS, "setr pup", "setr naive"]
CASES = [
    (name, memory)
    for name in FORMS
    for memory in (None, "mcibipp", "mcibi")
    if memory is None or models.registry.combines(name.split()[0])
]
# Of two processes: every framework once, with MCIBI++ where it combines, and one with each memory.
POOLED = [
    (name, memory)
    for name, memory in CASES
    if thinning.ALL
    or name == "ocrnet"
    or memory == ("mcibipp" if models.registry.combines(name.split()[0]) else None)
]
# What makes a framework small besides Z.
OPTIONS: dict[str, dict[str, Any]] = {
    "annnet": {"context_channels": 6, "pool_scales": (1, 3)},
    "danet": {"context_channels": 4},
    "emanet": {"bases": 4},
    "ce2p": {"edge_channels": 6, "shortcut_channels": 4},
    "deeplabv3plus": {"dilations": (1, 2), "shortcut_channels": 4},
    "dmnet": {"filter_sizes": (1, 3)},
    "encnet": {"num_codes": 4},
    "isanet": {"context_channels": 6, "block_size": (4, 4)},
    "maskformer": {"mask_channels": 6, "queries": 7, "layers": 2, "transform_channels": 16}
    | {"hidden_channels": 10},
    "pointrend": {"strides": Stub.reductions, "pyramid_channels": 8, "sum_channels": 6}
    | {"points": 20, "subdivision_points": 30},
    "psanet": {"mask_size": (5, 5)},
    "semanticfpn": {"strides": Stub.reductions, "pyramid_channels": 8, "sum_channels": 6},
    "setr": {"mla_channels": 6, "up_channels": 4, "auxiliary_channels": 6},
    "setr pup": {"decoder": "pup", "up_channels": 4, "auxiliary_channels": 6},
    "setr naive": {"decoder": "naive", "up_channels": 4, "auxiliary_channels": 6},
}


def build(name: str, memory: str | None, *, dropout: float = 0.0) -> Segmentor:
    """A small model in float64, always the same, whose gates are open and whose memory is set."""
    options = {"feats_channels": Z, "dropout": dropout, **OPTIONS.get(name, {})}
    if memory:
        options["transform_channels"] = 8
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = models.head_type(name.split()[0], memory)(K, Stub.channels, **options)
        model = Segmentor(Stub(), head).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        for parameter in model.parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5)
        if memory:
            model.memory.memory.normal_(0.5, 0.5, generator=generator)
    return model


def run(rank: int, world: int) -> dict[str, Tensor]:
    """Weights and states after two steps, of all peers, with frozen batch norm."""
    results = {}
    for name, memory in POOLED:
        for own, value in trained(name, memory, rank, world).items():
            results[f"{name} {memory} {own}"] = value
    return results


def trained(name: str, memory: str | None, rank: int, world: int) -> dict[str, Tensor]:
    model = build(name, memory).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    runner = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    share = slice(2 * rank, 2 * rank + 2) if world > 1 else slice(0, 4)
    for _ in range(2):
        images = torch.randn(4, 3, 24, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, K, (4, 24, 32), generator=generator)
        optimizer.zero_grad()
        losses = runner(images[share], labels[share]).losses
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return {own: value.detach().clone() for own, value in model.state_dict().items()}


if __name__ == "__main__":
    main(run)
