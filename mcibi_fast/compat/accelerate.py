"""Accelerates a model of the authors' released package (sssegmentation) in place.

Modules are recognised by the names of the classes whose methods they run, so the package is not
imported. Such a module keeps its parameters, buffers and hooks; its class is replaced by a subclass
in which the slow methods are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mcibi_fast import ops
from mcibi_fast.nn.memory import GaussianMemory
from mcibi_fast.nn.rows import rows, to_map


def accelerate(model: nn.Module) -> nn.Module:
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

    Subclasses that override one of these methods keep their own. Calling it again changes nothing.

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
    modules = list(model.modules())
    found = sum(_swap(module) for module in modules)
    if not found:
        raise ValueError(
            f"accelerate: {type(model).__name__} holds no FeaturesMemoryV2 and no "
            "SelfAttentionBlock of sssegmentation; pass a model of that package (to load one of "
            "its checkpoints, use compat.sssegmentation.load)"
        )
    for module in modules:
        bottleneck = getattr(module, "bottleneck", None)
        if isinstance(getattr(module, "memory_module", None), _Memory) and bottleneck is not None:
            _mark_output(bottleneck)
    return model


class _Swapped(nn.Module):
    """Base of the classes with the new methods.

    Classes made by `_subclass` cannot be pickled by name, so `_revive` makes them again.
    """

    replaces: str
    methods: Sequence[str] = ("forward",)
    attributes: Sequence[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        own, released = type(self).__bases__
        return _revive, (own, released), super().__reduce_ex__(protocol)[2]


class _Memory(_Swapped):
    """The new methods of FeaturesMemoryV2 (Eqs. 6-9 and 11-13, in the released form)."""

    replaces = "FeaturesMemoryV2"
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

    def forward(self, feats: Tensor, preds: Tensor) -> tuple[Tensor, Tensor]:
        """R (B, Z, h, w) and the gathering logits (B, K, h, w) -> C_dl (K, Z) and R_aug."""
        memory = _wide(self.memory.data)
        noise = _unit_table(self.num_classes, self.feats_channels, memory.device)
        gathered = ops.gaussian_aggregate(
            preds, memory, self.feats_channels, noise=noise, hard=bool(self.use_hard_aggregate)
        )
        downsample: Any = getattr(self, "downsample_before_sa", None)
        attend: Any = self.self_attention
        if downsample is None:
            context = attend(feats, gathered)
        else:
            context = F.interpolate(
                attend(downsample(feats), downsample(gathered)),
                size=feats.shape[2:],
                mode="bilinear",
                align_corners=bool(self.align_corners),
            )
        fuse: Any = self.bottleneck
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
        if isinstance(features, _Upsampled):
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


def _swap(module: nn.Module) -> bool:
    """Gives the module its new methods, if it is of a known class; returns whether it has them."""
    kind: Any = type(module)
    if isinstance(module, _Swapped):
        return True
    for own in (_Memory, _Attention):
        owners = {_owner(kind, method) for method in own.methods}
        if owners == {own.replaces} and all(hasattr(module, a) for a in own.attributes):
            module.__class__ = _subclass(own, kind)
            return True
    return False


def _owner(kind: type, method: str) -> str | None:
    """The name of the class that defines the method."""
    return next((base.__name__ for base in kind.__mro__ if method in vars(base)), None)


@cache
def _subclass(own: type[_Swapped], released: type[nn.Module]) -> type[_Swapped]:
    return type(released.__name__, (own, released), {"__doc__": own.__doc__})


def _revive(own: Any, released: Any) -> _Swapped:
    """The empty module that copying and unpickling then fill."""
    kind: Any = _subclass(own, released)
    return kind.__new__(kind)


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
        if (
            func is F.interpolate
            and kwargs.get("mode") == "bilinear"
            and isinstance(kwargs.get("size"), (tuple, list))
            and not kwargs.get("antialias")
            and not torch.is_grad_enabled()
        ):
            low, align_corners = args[0].as_subclass(Tensor), bool(kwargs.get("align_corners"))
            return _Upsampled(low, kwargs["size"], align_corners)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class _Upsampled(Tensor):
    """``F.interpolate(low, size, mode="bilinear")`` that is computed only when an op reads it."""

    low: Tensor
    align_corners: bool

    @staticmethod
    def __new__(cls, low: Tensor, size: Sequence[int], align_corners: bool) -> _Upsampled:
        self = Tensor._make_wrapper_subclass(
            cls, (*low.shape[:2], *size), dtype=low.dtype, device=low.device
        )
        self.low, self.align_corners = low, align_corners
        return self

    def compute(self) -> Tensor:
        return F.interpolate(
            self.low, size=self.shape[2:], mode="bilinear", align_corners=self.align_corners
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
