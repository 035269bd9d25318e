"""What forwards with labels leave for the memory, until the optimiser's step applies it.

The backward pass of such a forward adds its statistics to those that the memory keeps for the
present step; a forward without a backward pass leaves nothing. After ``step`` of an optimiser that
holds a parameter of the context, the memory takes what was kept as one update. So several
micro-batches of one step count as one batch, as they do for the gradient.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_contexts: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # each has a memory
_numbers = itertools.count()  # ranks that make the same model follow its contexts in one order


class Kept:
    """The sums over the forwards of one step whose backward pass has come.

    Attributes:
        statistics: what the memory collects from a batch, added up.
        forwards: number of these forwards, int64 ().
        superseded: whether an explicit update takes the place of this step's.
    """

    def __init__(self, nothing: Sequence[Tensor], device: torch.device) -> None:
        self.statistics = list(nothing)
        self.forwards = torch.zeros((), dtype=torch.int64, device=device)
        self.superseded = False
        self._seen: list[StorageWeakRef] = []  # of the step's features
        self._learnt: list[StorageWeakRef] = []  # of those that the last step applied

    def fits(self, statistics: Sequence[Tensor]) -> bool:
        """Whether these can be added."""
        kinds = ([(t.dtype, t.device) for t in each] for each in (self.statistics, statistics))
        return next(kinds) == next(kinds)

    def see(self, features: Tensor) -> None:
        """Notes features whose forward has labels."""
        if not torch.compiler.is_compiling():
            self._seen = [ref for ref in self._seen if not ref.expired()]
            self._seen.append(StorageWeakRef(features.untyped_storage()))

    def has_learnt(self, features: Tensor) -> bool:
        """Whether the last step has applied the statistics of these features."""
        if torch.compiler.is_compiling() or not self._learnt:
            return False
        return StorageWeakRef(features.untyped_storage()) in self._learnt

    def next_step(self) -> None:
        """Begins another step without anything."""
        for tensor in (*self.statistics, self.forwards):
            tensor.zero_()
        self._learnt, self._seen = [] if self.superseded else self._seen, []
        self.superseded = False


def observe(kept: Kept, statistics: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs; their backward pass adds the statistics to ``kept``."""
    into = [*kept.statistics, kept.forwards]
    new = [*statistics, torch.ones_like(kept.forwards)]
    return list(_Observed.apply(len(into), *into, *new, *outputs))


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        ctx.count = count
        ctx.into, ctx.new = tensors[:count], tensors[count : 2 * count]
        ctx.set_materialize_grads(False)
        ctx.added = False
        # Not views of the inputs, which must not be changed in place.
        return tuple(output.detach() for output in tensors[2 * count :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = next((g for g in grads if g is not None), None)
        if grad is not None and not ctx.added:  # a retained graph may come again
            ctx.added = not torch.compiler.is_compiling()
            with torch.no_grad():
                for into, new in zip(ctx.into, ctx.new, strict=True):
                    into.copy_(_sum_in_backward(into, new, grad.detach()))
        return (None, *[None] * (2 * ctx.count), *grads)


@torch.library.custom_op("mcibi_fast::sum_in_backward", mutates_args=())
def _sum_in_backward(kept: Tensor, new: Tensor, grad: Tensor) -> Tensor:
    """``kept + new``; takes the gradient so that no compiler computes it in the forward."""
    return kept + new


@_sum_in_backward.register_fake
def _(kept: Tensor, new: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(kept)


def follow_optimizers(context: nn.Module) -> None:
    """From now on the steps of its optimiser update the context's memory."""
    _contexts[next(_numbers)] = context


def lr_factor(group: dict[str, Any]) -> float | None:
    """The learning rate of an optimiser's group, divided by the initial one.

    None if there is no initial one, which learning rate schedulers note in the group. That of
    OneCycleLR and CyclicLR is not where they begin but the largest.
    """
    initial = group.get("max_lr", group.get("initial_lr"))
    known = isinstance(initial, Tensor) or bool(initial)  # a tensor may be on a GPU: not read
    return group["lr"] / initial if known else None


def _after_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    held: dict[int, dict[str, Any]] = {}  # the group of each parameter
    for context in list(_contexts.values()):
        memory: Any = context.memory
        if not hasattr(memory, "observes"):  # an exported form's constants, which never change
            continue
        poly = memory.momentum_schedule == "poly" and not memory.scheduled
        if not (memory.observes or (poly and memory.training)):
            continue
        held = held or {id(p): group for group in optimizer.param_groups for p in group["params"]}
        learnt = [p for p in context.parameters() if p.requires_grad]
        groups = [held[id(p)] for p in learnt if id(p) in held]
        if learnt and not groups:
            continue
        factor = lr_factor((groups or optimizer.param_groups)[0]) if poly else None
        if memory.observes:
            if factor is not None:
                memory._scale_momentum(factor)
            memory.learn()
        elif groups and isinstance(factor, float) and factor != 1:
            warnings.warn(
                "momentum_schedule: with 'poly' call model.schedule(epoch=..., lr_factor=...) "
                "before every step; it was not called, so the momentum stays as it is. For "
                "transformers' Trainer there is a callback, "
                "mcibi_fast.compat.transformers.schedule.MemorySchedule",
                stacklevel=2,
            )


register_optimizer_step_post_hook(_after_step)
