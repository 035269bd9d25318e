"""Bilinear upsampling that waits until it is known what reads it.

The last thing that most segmentation models do is ``F.interpolate`` to the size of the image, and
the first thing that is done with the result is a cross entropy or an argmax. Both can be computed
without the upsampled logits. So `upsample` returns a stand-in: a tensor whose values are computed
only if something else reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from mcibi_fast.compat import reads, views
from mcibi_fast.compat.reads import FLOATS


def upsample(low: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """``F.interpolate(low, size, mode="bilinear", align_corners=...)``, postponed where it can be.

    Not postponed, because nothing would be gained or because a stand-in could not be followed:
    logits of one class, downsampling, and whatever a compiler, an export, ``torch.jit.trace``,
    ``torch.func`` or forward-mode differentiation traces.

    Args:
        low: (B, K, h, w).
        size: (H, W).
    """
    if _can_wait(low, size):
        return postpone(low, Upsampling.to(size, align_corners))
    return F.interpolate(low, size, mode="bilinear", align_corners=align_corners)


def _can_wait(low: Tensor, size: tuple[int, int]) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(low) is Tensor
        and low.dim() == 4
        and low.dtype in FLOATS
        and low.shape[1] > 1
        and low.numel() > 0
        and size[0] * size[1] > low.shape[2] * low.shape[3]
        and min(size) > 0
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class Upsampling(NamedTuple):
    """What a stand-in's values are of ``low``, (B, K, h, w).

    Attributes:
        size: (H, W), to which ``low`` is upsampled.
        align_corners: as in ``F.interpolate``.
        window: the rows and the columns of it that are kept, as slices without a step.
        batched: the result is (B, K, H, W); otherwise (K, H, W), of B = 1.
        softmax: ``torch.softmax`` or ``torch.log_softmax`` over the classes afterwards, or None.
    """

    size: tuple[int, int]
    align_corners: bool
    window: tuple[slice, slice]
    batched: bool = True
    softmax: Callable[..., Tensor] | None = None

    @classmethod
    def to(cls, size: tuple[int, int], align_corners: bool) -> Upsampling:
        """The whole image."""
        return cls(size, align_corners, (slice(0, size[0]), slice(0, size[1])))

    @property
    def inside(self) -> tuple[Any, ...]:
        """The index of the window."""
        return (..., *self.window)

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """What the window leaves out, as ``F.pad`` has it: left, right, top, bottom."""
        (height, width), (rows, columns) = self.size, self.window
        return columns.start, width - columns.stop, rows.start, height - rows.stop

    def values(self, low: Tensor) -> Tensor:
        """The values, computed below autograd."""
        result = self._whole(low)
        if any(self.margins):
            result = result[self.inside]
        return result if self.batched else result[0]

    def backward(self, grad: Tensor, low: Tensor) -> Tensor:
        """The gradient of ``low`` from that of the values."""
        grad = F.pad(grad if self.batched else grad[None], self.margins)
        aten = torch.ops.aten
        if self.softmax is not None:
            log = self.softmax is torch.log_softmax
            through = aten._log_softmax_backward_data if log else aten._softmax_backward_data
            grad = through(grad, self._whole(low), 1, grad.dtype)
        return aten.upsample_bilinear2d_backward(grad, self.size, low.shape, self.align_corners)

    def _whole(self, low: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.upsample_bilinear2d(low, self.size, self.align_corners)
        return result if self.softmax is None else self.softmax(result, 1)


def postpone(low: Tensor, how: Upsampling) -> Upsampled:
    """The stand-in for these values."""
    result: Upsampled = _Postpone.apply(low, how)
    with torch._C.DisableTorchFunctionSubclass():
        result._node = result.grad_fn
    return result


class _Postpone(torch.autograd.Function):
    """The stand-in as a node of autograd's graph, as ``F.interpolate`` would be one."""

    @staticmethod
    def forward(ctx: Any, low: Tensor, how: Upsampling) -> Tensor:
        ctx.how = how
        if how.softmax is None:  # then only its shape is needed
            ctx.low = low.new_empty(()).expand(low.shape)
        else:
            ctx.save_for_backward(low)
        return Upsampled(low, how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        low = ctx.low if ctx.how.softmax is None else ctx.saved_tensors[0]
        return ctx.how.backward(grad, low.to(grad.dtype)).to(low.dtype), None


class Upsampled(Tensor):
    """The bilinearly upsampled ``low``, computed when something reads its values.

    A cross entropy over classes, an argmax or a maximum over classes reads ``low`` instead. All
    else sees an ordinary tensor, computed once and kept: from then on the stand-in passes
    everything on to it, so that in-place operations, hooks and ``grad`` are those of one tensor.
    Before that, a copy to another dtype or device copies ``low``, and ``detach``, ``x[0]``,
    ``softmax(1)`` and the like are further stand-ins that share the values of this one.

    Attributes:
        low: (B, K, h, w), the tensor to upsample; of (1, K, h, w) for a stand-in of (K, H, W).
        how: what the values are of it.
    """

    low: Tensor
    how: Upsampling
    _value: Tensor | None
    _origin: Upsampled | None
    _taken: Callable[[Tensor], Tensor]
    _node: Any
    _version_read: int | None

    @staticmethod
    def __new__(cls, low: Tensor, how: Upsampling) -> Upsampled:
        (channels, height, width), last = (low.shape[1], *how.size), suggest_memory_format(low)
        if last == torch.channels_last:
            strides = (channels * height * width, 1, width * channels, channels)
        else:
            strides = (channels * height * width, height * width, width, 1)
        shape = (len(low), channels, *(part.stop - part.start for part in how.window))
        self = Tensor._make_wrapper_subclass(
            cls,
            shape if how.batched else shape[1:],
            strides=strides if how.batched else strides[1:],
            dtype=_result_dtype(low),
            device=low.device,
        )
        self.low, self.how = low, how
        self._value = self._origin = self._node = None
        self._version_read = None if low.is_inference() else low._version
        return self

    @property
    def align_corners(self) -> bool:
        return self.how.align_corners

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Upsampled):
            if func is Tensor.__hash__ or (func in _METADATA and first._value is None):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _HANDLED:
                named = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
                result = _HANDLED[func](*args, **named)
                if result is not NotImplemented:
                    return result
        args, kwargs = tree_map_only(Upsampled, Upsampled.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # What autograd or C++ code calls; calls from Python are at __torch_function__ before.
        if func is torch.ops.aten.clone.default:
            return args[0]._compute()
        for argument, given in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(isinstance(x, Upsampled) for x in tree_leaves(given)):
                raise RuntimeError(f"{func} writes into upsampled logits; pass logits.value()")
        args, kwargs = tree_map_only(Upsampled, Upsampled._compute, (args, kwargs or {}))
        return func(*args, **kwargs)

    def value(self) -> Tensor:
        """The upsampled logits as an ordinary tensor, which autograd follows to ``low``."""
        if self._value is None:
            with (
                torch._C.DisableTorchFunction(),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                if self._origin is None:
                    self._value = self.clone()
                else:
                    self._value = self._taken(self._origin.value())
        return self._value

    def _compute(self) -> Tensor:
        """The values, below autograd."""
        self._check()
        return self.how.values(self.low.detach().to(self.dtype))

    def _check(self) -> None:
        if self._version_read is not None and self.low._version != self._version_read:
            raise RuntimeError(
                "logits were changed in place after they were upsampled, before the upsampled "
                "logits were read (compat.<library>.restore(model) upsamples at once)"
            )

    def source(self) -> Tensor | None:
        """``low``, where it can be read instead of the values.

        Not once the values exist, as they may have been changed or have hooks; and not if autograd
        has given the stand-in another history (a reentrant checkpoint, DistributedDataParallel).
        """
        if self._value is not None or (self._origin is not None and self._origin.source() is None):
            return None
        self._check()
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad and self.grad_fn is not self._node:
                return None
        return self.low

    def share(self, low: Tensor, view: Callable[[Tensor], Tensor], **changed: Any) -> Upsampled:
        """A stand-in for a view of this one's values.

        Args:
            low: what the view's values are computed from.
            view: gives the view of the values.
            **changed: how they are computed, where it differs (fields of `Upsampling`).
        """
        result = postpone(low, self.how._replace(**changed))
        result._origin, result._taken = self, view
        return result

    def copy(self, dtype: torch.dtype, device: Any) -> Any:
        """A stand-in of its own, not touched by what happens to this one."""
        if (low := self.source()) is None:
            return NotImplemented
        return postpone(low.to(device, dtype), self.how)

    def again(self, size: tuple[int, int], align_corners: bool) -> Tensor:
        """Upsampled once more, from the values: two interpolations are not one."""
        return upsample(self.value(), size, align_corners)


def _result_dtype(low: Tensor) -> torch.dtype:
    """The dtype that ``F.interpolate`` gives here, which autocast may choose."""
    return F.interpolate(low.detach()[:1, :1, :1, :1], (1, 1), mode="bilinear").dtype


_HANDLED: dict[Any, Callable[..., Any]] = reads.READS | views.VIEWS
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_sparse",
    "is_meta", "is_quantized", "is_nested", "nbytes", "itemsize",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_complex",
    "is_floating_point", "is_inference", "element_size", "get_device", "__len__",
)  # fmt: skip
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.numel, torch.is_floating_point, torch.is_complex]
)
