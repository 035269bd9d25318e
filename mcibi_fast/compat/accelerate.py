"""Accelerates a model of the authors' released package (sssegmentation) in place.

A module is recognised by the class whose methods it runs. The package is not imported; its classes
are the ones of known names that derive from ``nn.Module`` itself. A subclass may have the same name
(ISANet's attention has), but it is not that class: methods of its own stay. Such a module keeps its
parameters, buffers and hooks; its class is replaced by a subclass in which the slow methods are
replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.compat.adapter import Explanation, Library, Place
from mcibi_fast.compat.upsampled import Upsampled, upsample
from mcibi_fast.compat.views import bilinear_arguments
from mcibi_fast.nn.memory import GaussianMemory
from mcibi_fast.nn.rows import rows, to_map
from mcibi_fast.nn.swapping import Swapped

_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(model: _Model) -> _Model:
    """Replaces the slow methods of the released package in place; results are equal up to rounding.

    Weights, keys of the state dict, hooks and ``isinstance`` stay the same, and the model can be
    copied and pickled if it could be before. What changes:

    * ``FeaturesMemoryV2.forward`` reads its noise from a fixed table instead of seeding the global
      generator once per class. So dropout and augmentation no longer repeat in every step.
    * ``FeaturesMemoryV2.update`` never forms the upsampled features: the ``F.interpolate`` in
      ``MCIBIPlusPlus.forward``, which is not replaced, returns a stand-in that is upsampled only if
      something other than ``update`` reads it. A label that is neither a class nor
      ``ignore_index`` is an error (on a GPU see :func:`mcibi_fast.ops.check_labels`), whereas -1
      used to update the last class; a momentum outside [0, 1] is an error as well.
    * ``SelfAttentionBlock.forward`` never forms the attention's scores. Its gradient can be taken
      once, but not a second time (no second derivatives).

    Subclasses that override one of these methods keep their own; what they inherit is replaced.
    Calling it again changes nothing.

    Args:
        model: the released model, or anything that contains it (such as DistributedDataParallel).

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is nothing to accelerate in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    places = list(_places(model))
    if not any(place.own for place in places):
        raise ValueError(
            f"accelerate: {type(model).__name__} holds no FeaturesMemoryV2 and no "
            "SelfAttentionBlock of sssegmentation; pass a model of that package (to load one of "
            "its checkpoints, use compat.sssegmentation.load)"
        )
    LIBRARY.accelerate(model)
    for bottleneck in _bottlenecks(model):
        _mark_output(bottleneck)
    return model


def restore(model: _Model) -> _Model:
    """Undoes `accelerate`, in place: the released package's own methods run again.

    Raises:
        ValueError: nothing in it is accelerated.
    """
    for bottleneck in _bottlenecks(model):
        for key, hook in list(bottleneck._forward_hooks.items()):
            if hook is _mark:
                del bottleneck._forward_hooks[key]
    return LIBRARY.restore(model)


def explain(model: nn.Module) -> Explanation:
    """What is replaced in a released model, what `accelerate` can replace, what is left alone.

    Raises:
        ValueError: it holds no module that `accelerate` knows.
    """
    return LIBRARY.explain(model)


def _bottlenecks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose output R goes to a new ``update``."""
    for module in model.modules():
        memory = getattr(module, "memory_module", None)
        if isinstance(memory, _Memory) and "update" in memory.made_of[2]:
            bottleneck = getattr(module, "bottleneck", None)
            if bottleneck is not None:
                yield bottleneck


class _Swapped(Swapped):
    """Base of the mixins with the new methods.

    Attributes:
        replaces: the released class.
        attributes: what a module of this class has.
        why: for `explain`.
    """

    replaces: str
    attributes: Sequence[str]
    why: str


class _Memory(_Swapped):
    """The new methods of FeaturesMemoryV2 (Eqs. 6-9 and 11-13, in the released form)."""

    replaces = "FeaturesMemoryV2"
    why = "forward reads a fixed table of noise; update never forms the upsampled features"
    methods = ("forward", "update")
    attributes = (
        "memory",
        "self_attention",
        "bottleneck",
        "num_classes",
        "feats_channels",
        "use_hard_aggregate",
        "align_corners",
    )
    memory: nn.Parameter
    num_classes: int
    feats_channels: int
    use_hard_aggregate: bool
    align_corners: bool
    self_attention: Any
    bottleneck: Any

    def forward(self, feats: Tensor, preds: Tensor) -> tuple[Tensor, Tensor]:
        """R (B, Z, h, w) and the gathering logits (B, K, h, w) -> C_dl (K, Z) and R_aug."""
        memory = _wide(self.memory.data)
        noise = _unit_table(self.num_classes, self.feats_channels, memory.device)
        gathered = ops.gaussian_aggregate(
            preds, memory, self.feats_channels, noise=noise, hard=bool(self.use_hard_aggregate)
        )
        downsample: Any = getattr(self, "downsample_before_sa", None)
        attend = self.self_attention
        if downsample is None:
            context = attend(feats, gathered)
        else:
            context = F.interpolate(
                attend(downsample(feats), downsample(gathered)),
                size=feats.shape[2:],
                mode="bilinear",
                align_corners=bool(self.align_corners),
            )
        fuse = self.bottleneck
        table = ops.gaussian_table(memory, self.feats_channels, noise=noise)
        return table.to(preds.dtype), fuse(torch.cat([feats, context], dim=1))

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        segmentation: Tensor,
        ignore_index: int = -100,
        momentum_cfg: Any = None,
        learning_rate: float | None = None,
    ) -> None:
        """Updates the memory; across ranks it becomes the mean of their memories.

        The features have the labels' size: they are upsampled, or a stand-in that is not upsampled
        yet.
        """
        momentum = momentum_cfg["base_momentum"]
        if momentum_cfg["adjust_by_learning_rate"]:
            momentum = momentum / momentum_cfg["base_lr"] * learning_rate
        labels = segmentation.long().reshape(len(features), *features.shape[2:])
        low, align_corners = features, False
        if isinstance(features, Upsampled):
            low, align_corners = features.low, features.align_corners
        memory = ops.memory_update(
            _wide(self.memory.data),
            low,
            labels,
            momentum=float(momentum),
            unbiased=True,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(memory.div_(dist.get_world_size()))
        self.memory = nn.Parameter(memory.to(self.memory.dtype), requires_grad=False)


class _Attention(_Swapped):
    """The new method of SelfAttentionBlock (Eq. 13)."""

    replaces = "SelfAttentionBlock"
    why = "forward never forms the scores of the attention"
    attributes = (
        "query_project",
        "key_project",
        "value_project",
        "out_project",
        "query_downsample",
        "key_downsample",
        "matmul_norm",
        "transform_channels",
    )
    query_project: nn.Module
    key_project: nn.Module
    value_project: nn.Module
    out_project: nn.Module | None
    query_downsample: nn.Module | None
    key_downsample: nn.Module | None
    transform_channels: int
    matmul_norm: bool

    def forward(self, query_feats: Tensor, key_feats: Tensor) -> Tensor:
        """(B, C, h, w) and (B, C', h', w') -> (B, C'', h, w)."""
        query = self.query_project(query_feats)
        key, value = self.key_project(key_feats), self.value_project(key_feats)
        if self.query_downsample is not None:
            query = self.query_downsample(query)
        if self.key_downsample is not None:
            key, value = self.key_downsample(key), self.key_downsample(value)
        scale = self.transform_channels**-0.5 if self.matmul_norm else 1.0
        context = ops.confidence_attention(rows(query), rows(key), rows(value), scale=scale)
        gathered = to_map(context, query_feats)
        return gathered if self.out_project is None else self.out_project(gathered)


def _places(model: Any) -> Iterator[Place]:
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        kind = type(module)
        for own in (_Memory, _Attention):
            if isinstance(module, own):
                yield Place(name, module, own, own.why)
                continue
            released = _released(kind, own)
            if released is None or not all(hasattr(module, a) for a in own.attributes):
                continue
            inherited = tuple(m for m in own.methods if _owner(kind, m) is released)
            why = own.why if inherited else "it has methods of its own"
            yield Place(name, module, own if inherited else None, why, inherited or None)


def _released(kind: type, own: type[_Swapped]) -> type | None:
    """The package's class that this class is or derives from."""
    for base in kind.__mro__:
        if base.__name__ == own.replaces and base.__bases__ == (nn.Module,):
            return base
    return None


def _owner(kind: type, method: str) -> type | None:
    """The class that defines the method."""
    return next((base for base in kind.__mro__ if method in vars(base)), None)


@cache
def _unit_table(num_classes: int, channels: int, device: torch.device) -> Tensor:
    """The noise (K, Z) of the released code; cached, because drawing it takes milliseconds."""
    with torch.inference_mode(False):  # so that training can use it as well
        table = GaussianMemory(num_classes, channels, form="released").noise_table
        assert table is not None
        return table.to(device)


def _wide(memory: Tensor) -> Tensor:
    return memory if memory.dtype == torch.float64 else memory.float()


# --- postponed upsampling -----------------------------------------------------------------------


def _mark_output(bottleneck: nn.Module) -> None:
    if _mark not in bottleneck._forward_hooks.values():
        bottleneck.register_forward_hook(_mark)


def _mark(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.as_subclass(_PixelRepresentations) if module.training else output


class _PixelRepresentations(Tensor):
    """R: a tensor whose upsampling without a gradient is postponed until the result is used."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and not torch.is_grad_enabled():
            asked = bilinear_arguments(*args, **kwargs)
            if asked is not None:
                return upsample(args[0].as_subclass(Tensor), *asked)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


LIBRARY = Library("sssegmentation", _places, "FeaturesMemoryV2 and SelfAttentionBlock")
