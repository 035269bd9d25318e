"""The base class of the memories: their momentum and its schedule, ``fixed``, initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mcibi_fast.nn.transient import TransientTensors
from mcibi_fast.ops import checks

Init = Literal["standard", "pixel", "cluster"]
MomentumSchedule = Literal["fixed", "poly"]


class ClassMemory(TransientTensors):
    """What the network remembers of every class; ``update`` fills it.

    The buffer ``memory`` is what a state dict holds. The attribute ``met`` (K,) says which
    classes have been set.

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        momentum: m; a plain attribute that may be set at any time.
        momentum_schedule: how ``schedule`` changes the momentum: "fixed" keeps it, "poly" scales
            it with the learning rate ("0.9-Poly" in Table 4).
        fixed: never change what was set once.
        init: "standard", "pixel" or "cluster"; each memory says what they do.
        seed: seed for the pixels that ``initialize`` picks; give every rank the same one.
        ignore_index: label that belongs to no class.
        align_corners: whether features are upsampled to the labels' size with aligned corners.
    """

    memory: Tensor
    per_class = 1  # number of representations of each class

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        momentum: float,
        momentum_schedule: MomentumSchedule,
        fixed: bool,
        init: Init,
        seed: int,
        ignore_index: int,
        align_corners: bool,
    ) -> None:
        super().__init__()
        _check_choice("momentum_schedule", momentum_schedule, ("fixed", "poly"))
        _check_choice("init", init, ("standard", "pixel", "cluster"))
        momentum = checks.fraction("momentum", momentum)
        self.num_classes = num_classes
        self.channels = channels
        self.momentum = self.initial_momentum = momentum
        self.momentum_schedule = momentum_schedule
        self.fixed = fixed
        self.init: Init = init
        self.seed = seed
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def schedule(self, *, lr_factor: float) -> None:
        """Sets the momentum for the next update; call it before every training step.

        Args:
            lr_factor: the current learning rate divided by the initial one.
        """
        if self.momentum_schedule == "poly":
            self.momentum = self.initial_momentum * lr_factor

    @property
    def met(self) -> Tensor:
        """(K,): which classes have been set."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Forgets everything, as after ``__init__``; also for a memory without values yet."""
        raise NotImplementedError

    def representations(self) -> Tensor:
        """C_dl (K, Z)."""
        raise NotImplementedError

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12) from the logits of W: (B, K, h, w) -> (B, Z, h, w)."""
        raise NotImplementedError

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Learns from R (B, Z, h, w) and labels (B, H, W)."""
        raise NotImplementedError

    def initialize(self, features: Tensor, labels: Tensor) -> None:
        """Sets the classes that are not set yet from pixels of R (B, Z, h, w) picked at random."""
        raise NotImplementedError

    def initialize_from(self, centres: Tensor) -> None:
        """Sets the classes that are not set yet from cluster centres (K, n, Z); zero means none."""
        raise NotImplementedError

    def _pick_pixels(self, labels: Tensor, seed: int) -> Tensor:
        """``labels`` in which only one random pixel of each class that is not set is kept."""
        picked = torch.full(
            labels.shape, self.ignore_index, dtype=torch.int64, device=labels.device
        )
        generator = torch.Generator().manual_seed(seed)
        labels = labels.long()  # their own dtype may be too small for k or ignore_index
        for k in self.met.logical_not().nonzero().flatten().tolist():
            positions = (labels == k).flatten().nonzero().flatten()
            if k != self.ignore_index and len(positions):
                pick = int(torch.randint(len(positions), (), generator=generator))
                picked.view(-1)[positions[pick]] = k
        return picked

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"features: expected (B, {self.channels}, h, w), got {tuple(features.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassMemory:
        memory = self.memory
        super()._apply(fn, recurse)
        if self.memory.dtype not in (torch.float32, torch.float64):
            self.memory = memory.to(self.memory.device)
        return self


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _process_group() -> dist.ProcessGroup | None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def _from_first_rank(values: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """For each class the values of the lowest rank that found it; and which classes any found."""
    group = _process_group()
    if group is None:
        return values, found
    world = dist.get_world_size(group)
    all_values = [torch.empty_like(values) for _ in range(world)]
    all_found = [torch.empty_like(found, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(all_values, values, group=group)
    dist.all_gather(all_found, found.to(torch.uint8), group=group)
    founds = torch.stack(all_found)
    first = founds.argmax(dim=0)
    classes = torch.arange(len(found), device=found.device)
    return torch.stack(all_values)[first, classes], founds.sum(dim=0) > 0


def _of_rank_zero(values: Tensor) -> Tensor:
    """The first rank's tensor, on every rank."""
    group = _process_group()
    if group is not None:
        dist.broadcast(values, 0, group=group)
    return values
