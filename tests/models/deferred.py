"""A small model whose every part depends on tensors outside its state dict, and what it computes.

As a script it is one of the processes of the test with FSDP: rank, number of processes, rendezvous
file, file with the weights, folder for the result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcibi_fast.models import MCIBIHead, MCIBIPPHead, Segmentor
from mcibi_fast.nn import DANet, PixelLoss, conv_bn_relu
from mcibi_fast.training.processes import leave_group

K = 5
KINDS: dict[str, dict[str, Any]] = {
    "released": {"form": "released"},
    "paper": {"form": "paper"},
    "fixed": {"form": "paper", "noise": "fixed", "seed": 3, "init": "standard"},
    "mcibi": {},
}


class TinyBackbone(nn.Module):
    """Two stages, without the seconds that importing timm takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = conv_bn_relu(3, 8, 3, stride=4)
        self.stage2 = conv_bn_relu(8, 12, 3, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.stage1(images)
        return [first, self.stage2(first)]


class Head(MCIBIPPHead):
    """With a context within the image that has a parameter of its own."""

    def gather_within_image(self, features: Any, R: Any, weight_logits: Any) -> Tensor:
        return self.within_image(features[-1])


def build(kind: str) -> Segmentor:
    options = {"feats_channels": 16, "transform_channels": 8, "dropout": 0.0}
    options |= {"loss": PixelLoss(class_weights=[0.5, 1.0, 2.0, 0.0, 1.5])}
    if kind == "mcibi":
        return Segmentor(TinyBackbone(), MCIBIHead(K, [8, 12], **options))
    within = DANet(12, 16, transform_channels=8)
    return Segmentor(
        TinyBackbone(), Head(K, [8, 12], within_image=within, **KINDS[kind], **options)
    )


def trained(kind: str) -> Segmentor:
    """With weights, statistics and a memory that are not those of the start."""
    torch.manual_seed(0)
    model = build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    steps(model, seed=1)
    return model


def inputs(seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    return images, torch.randint(0, K - 1, (2, 32, 32), generator=generator)


def steps(model: nn.Module, seed: int = 2) -> list[Tensor]:
    """The losses of two training steps without an optimiser."""
    model.train()
    found = []
    with torch.no_grad():
        for images, labels in (inputs(seed), inputs(seed + 1)):
            found.append(torch.stack(list(model(images, labels).losses.values())))
    return found


def outputs(model: nn.Module) -> list[Tensor]:
    """Logits of an evaluation, and losses of two steps from there."""
    with torch.no_grad():
        logits = model.eval()(inputs()[0]).logits
    return [logits, *steps(model)]


def sharded(kind: str, weights: dict[str, Tensor] | None) -> list[Tensor]:
    """The model of this rank, built on the meta device, sharded, materialised; and its outputs."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = build(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scalars = {p for p in model.parameters() if p.ndim == 0}  # which FSDP cannot shard
    for part in (model.backbone, model.head, model):
        fully_shard(part, mesh=mesh, ignored_params=scalars)
    model.to_empty(device="cpu")
    if weights is None:
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        memory = model.memory
        states = [memory.memory, memory.met, memory.representations()]
        return [*states, *(torch.ones(1) for p in model.parameters() if not p.isfinite().all())]
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    return outputs(model)


def main() -> None:
    rank, world, rendezvous, weights, folder = sys.argv[1:]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world)
    )
    states = torch.load(weights)
    found = {kind: sharded(kind, states[kind]) for kind in KINDS}
    found |= {f"{kind} fresh": sharded(kind, None) for kind in KINDS}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    leave_group()


if __name__ == "__main__":
    main()
