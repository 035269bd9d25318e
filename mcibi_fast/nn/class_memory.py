"""The base class of the memories: their momentum and its schedule, ``fixed``, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mcibi_fast.nn.observing import Kept, observe
from mcibi_fast.nn.transient import TransientTensors
from mcibi_fast.ops import checks

Init = Literal["standard", "pixel", "cluster"]
MomentumSchedule = Literal["fixed", "poly"]


class ClassMemory(TransientTensors):
    """What the network remembers of every class; training fills it.

    Either a context is called with labels, and the optimiser's step updates the memory
    (:meth:`DatasetLevelContext.forward`), or ``update`` is called at every step. The buffer
    ``memory`` is what a state dict holds. The attribute ``met`` (K,) says which classes have been
    set.

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        momentum: m; a plain attribute that may be set at any time.
        momentum_schedule: "fixed" keeps the momentum; "poly" scales it with the learning rate
            ("0.9-Poly" in Table 4), see ``schedule``.
        fixed: never change what was set once.
        init: "standard", "pixel" or "cluster"; each memory says what they do.
        seed: seed for the pixels that ``initialize`` picks; give every rank the same one.
        ignore_index: label that belongs to no class.
        align_corners: whether features are upsampled to the labels' size with aligned corners.

    Attributes:
        observes: whether a context was called with labels, so that optimiser steps update it.
        scheduled: whether ``schedule`` was called, which then sets the momentum alone.
    """

    memory: Tensor
    observes: bool = False
    scheduled: bool = False
    _kept: Kept | None = None
    _load: tuple[list[str], list[str]] | None = None  # see _load_from_state_dict
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

        It need not be called if the optimiser's steps update the memory and a learning rate
        scheduler of PyTorch (or any that notes ``initial_lr`` in the optimiser's groups, as
        mmengine's do) sets its learning rate: each step then reads the factor there.

        Args:
            lr_factor: the current learning rate divided by the initial one.
        """
        self.scheduled = True
        self._scale_momentum(lr_factor)

    def _scale_momentum(self, lr_factor: float) -> None:
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
        """Learns from R (B, Z, h, w) and labels (B, H, W) now.

        It takes the place of the automatic update of the next optimiser step. Features that the
        last one has applied are not applied again.
        """
        self._check_features(features)
        if self.observes and self._kept is not None:
            if self._kept.has_learnt(features):
                return
            self._kept.superseded = True
        self._update(features, labels)

    def observe(self, features: Tensor, labels: Tensor, *outputs: Tensor) -> list[Tensor]:
        """Returns the outputs, whose backward pass leaves the batch's statistics for the next step.

        Under ``torch.no_grad`` there is no backward pass and nothing happens.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
            outputs: what the loss is computed from.
        """
        self._check_features(features)
        if not torch.is_grad_enabled():
            return list(outputs)
        with torch.no_grad():
            statistics = self._collect(features.detach(), labels)
        if self._kept is None or not self._kept.fits(statistics):
            self._kept = Kept([torch.zeros_like(t) for t in statistics], self.memory.device)
        self.observes = True
        self._kept.see(features)
        return observe(self._kept, statistics, outputs)

    @torch.no_grad()
    def learn(self) -> None:
        """Updates the memory once by what forwards with labels have left, if they have.

        The step of a ``torch.optim.Optimizer`` calls it. Call it after the step of any other
        optimiser; every rank must.
        """
        if self._kept is not None:
            if not self._kept.superseded:
                self._learn(self._kept.statistics, self._kept.forwards.clamp(max=1))
            self._kept.next_step()

    @torch.no_grad()
    def _update(self, features: Tensor, labels: Tensor) -> None:
        self._learn(self._collect(features, labels), 1)

    def _collect(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        """What an update needs to know of a batch: sums over its pixels."""
        raise NotImplementedError

    def _nothing(self) -> list[Tensor]:
        """What ``_collect`` returns of no pixels."""
        raise NotImplementedError

    def _learn(self, statistics: Sequence[Tensor], steps: int | Tensor) -> None:
        """Updates the memory by the sum of all ranks' statistics, which may be changed in place.

        Args:
            statistics: sums of what ``_collect`` returned.
            steps: 1, or 0 if there was no batch.
        """
        raise NotImplementedError

    def keep_nothing(self) -> None:
        """Forgets what forwards with labels have left."""
        with torch.inference_mode(False):
            memory = self.memory
            self._kept = None if memory.is_meta else Kept(self._nothing(), memory.device)

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
        if self._kept is not None:
            self.keep_nothing()
        return self

    def train(self, mode: bool = True) -> ClassMemory:
        """Switches to training mode, or to evaluation mode."""
        if mode and self._kept is None:  # built without memory, on the meta device
            self.keep_nothing()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with nothing kept."""
        return self.__dict__ | {"_kept": None, "_load": None, "observes": False}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Saves the memory once, also if the model holds it both itself and in a context."""
        if not any(_share_storage(saved, self.memory) for saved in destination.values()):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        """Of several names that the memory has in a model, one in the state dict is enough."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *lists
        )
        if self._load is None or self._load[0] is not missing_keys:  # the list of another load
            self._load = missing_keys, []
        names = self._load[1]
        names.append(prefix + "memory")
        if set(names) - set(missing_keys):
            missing_keys[:] = [key for key in missing_keys if key not in names]


def _share_storage(saved: Any, memory: Tensor) -> bool:
    return (
        type(saved) in (Tensor, torch.nn.Parameter)
        and saved.untyped_storage()._cdata == memory.untyped_storage()._cdata
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _process_group() -> dist.ProcessGroup | None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def _pooled(statistics: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sums over all ranks, in place."""
    group = _process_group()
    if group is not None:
        for tensor in statistics:
            dist.all_reduce(tensor, group=group)
    return statistics


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
