"""One row per public op: everything the tests of all ops need to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mcibi_fast import ops
from mcibi_fast.ops.dispatch import _ops


def randn(g: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that are exact in every dtype a test may convert them to."""
    return torch.randn(shape, generator=g, dtype=torch.float64).bfloat16().to(dtype)


def label_map(g: Generator, shape: tuple[int, ...], num_classes: int) -> Tensor:
    """Blocky labels with a few ignored pixels and, where there are 3 classes, an absent one."""
    b, height, width = shape
    coarse = torch.randint(0, num_classes, (b, 1, 3, 4), generator=g).float()
    labels = F.interpolate(coarse, (height, width)).long().squeeze(1)
    if num_classes > 2:
        labels[labels == num_classes - 1] = 0
    labels[torch.rand(shape, generator=g) < 0.1] = 255
    return labels


@dataclass(frozen=True)
class Case:
    """An op's inputs at one size.

    ``inputs``: positional arguments, in float64; ``options``: keyword arguments;
    ``differentiable``: which positional arguments have a gradient; ``cast``: which follow the
    dtype under test; ``tolerance``: of float64 results between backends.
    """

    name: str
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0,)
    cast: tuple[int, ...] = (0,)
    note: str = ""
    tolerance: float = 1e-12

    def __str__(self) -> str:
        return f"{self.name}-{self.note}" if self.note else self.name

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    def args(self, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> list[Any]:
        """The positional arguments in a dtype and memory layout."""
        cast = [a.to(dtype) if i in self.cast else a for i, a in enumerate(self.inputs)]
        return [laid_out(a.clone(), layout) if isinstance(a, Tensor) else a for a in cast]

    def on(self, device: str) -> Case:
        """The same case with its tensors on another device."""
        inputs = tuple(moved(a, device) for a in self.inputs)
        options = {name: moved(o, device) for name, o in self.options.items()}
        return replace(self, inputs=inputs, options=options, note=f"{self.note}-{device}")

    def call(self, *args: Any) -> Tensor:
        """The first result."""
        result = self.op(*args, **self.options)
        return result[0] if isinstance(result, tuple) else result

    def backends(self, dtype: torch.dtype = torch.float64) -> list[str]:
        """The backends that can run this case on this machine, without the reference."""
        op = _ops[self.name]
        assert op.public is not None
        args = op.prepare(*self.args(dtype), **self.options)
        return [
            k.backend for k in op.kernels if k.backend != "reference" and k.why_not(*args) is None
        ]

    def chosen(self) -> str:
        """The backend that runs it: the first that can and is not slower than a later one."""
        op = _ops[self.name]
        args = op.prepare(*self.args(), **self.options)
        able = [k for k in op.kernels if k.why_not(*args) is None]
        fast = [k for k in able if k.slower is None or k.slower(*args) is None]
        return (fast or able)[0].backend


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values as a contiguous, channels_last or strided tensor."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    if layout == "strided":
        # Every second element of a larger tensor, whose other elements are poison.
        poison = float("nan") if t.is_floating_point() else -1
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), poison, device=t.device).to(t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


def moved(value: Any, device: str) -> Any:
    """A tensor or a noise on another device; anything else as it is."""
    if isinstance(value, ops.Philox):
        return ops.Philox(value.state.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


def _memory(g: Generator, num_classes: int) -> Tensor:
    return torch.stack([randn(g, num_classes), randn(g, num_classes).abs() + 0.1], dim=1)


def sums_case(
    size: tuple[int, ...], labels: tuple[int, int], K: int, note: str, **options: Any
) -> Case:
    g = Generator().manual_seed(hash_of(note))
    features = randn(g, *size)
    return Case(
        "class_feature_sums",
        (features, label_map(g, (size[0], *labels), K), K),
        options,
        note=note,
    )


def update_case(
    size: tuple[int, ...], labels: tuple[int, int], K: int, note: str, **options: Any
) -> Case:
    g = Generator().manual_seed(hash_of(note))
    inputs = (_memory(g, K), randn(g, *size), label_map(g, (size[0], *labels), K))
    return Case("memory_update", inputs, options, differentiable=(0, 1), cast=(1,), note=note)


def aggregate_case(
    size: tuple[int, ...], Z: int, note: str, philox: bool = False, **more: Any
) -> Case:
    g = Generator().manual_seed(hash_of(note))
    logits, memory = randn(g, *size), _memory(g, size[1])
    noise = ops.Philox(torch.tensor([7, 3])) if philox else randn(g, size[1], Z)
    return Case(
        "gaussian_aggregate",
        (logits, memory, Z),
        {"noise": noise, **more},
        note=note,
        # Philox's normal numbers are float32 and agree to 2e-6; a table of eps is exact.
        tolerance=2e-6 if philox else 1e-12,
    )


def attention_case(queries: int, keys: int, D: int, Dv: int, note: str, **options: Any) -> Case:
    g = Generator().manual_seed(hash_of(note))
    inputs = (randn(g, 2, queries, D), randn(g, 2, keys, D), randn(g, 2, keys, Dv))
    return Case(
        "confidence_attention",
        inputs,
        options,
        differentiable=(0, 1, 2),
        cast=(0, 1, 2),
        note=note,
    )


def class_rank_case(B: int, N: int, K: int, note: str, **more: Any) -> Case:
    g = Generator().manual_seed(hash_of(note))
    weights = torch.softmax(2 * randn(g, B, N, K), -1).bfloat16().double()
    hard = more.get("hard", False)
    return Case(
        "class_rank_attention",
        (randn(g, B, N, K), weights),
        {"scale": 1.5, **more},
        differentiable=(0,) if hard else (0, 1),
        cast=(0, 1),
        note=note,
    )


def cross_entropy_case(
    size: tuple[int, ...], labels: tuple[int, int], note: str, weighted: bool = False, **more: Any
) -> Case:
    g = Generator().manual_seed(hash_of(note))
    logits, K = randn(g, *size), size[1]
    weight = {"weight": randn(g, K).abs() + 0.5} if weighted else {}
    return Case(
        "upsample_cross_entropy",
        (logits, label_map(g, (size[0], *labels), K)),
        {**weight, **more},
        note=note,
    )


def argmax_case(size: tuple[int, ...], out: tuple[int, int], note: str, **options: Any) -> Case:
    logits = randn(Generator().manual_seed(hash_of(note)), *size)
    return Case("upsample_argmax", (logits, out), options, differentiable=(), note=note)


def confusion_case(
    size: tuple[int, ...], labels: tuple[int, int], note: str, **options: Any
) -> Case:
    g = Generator().manual_seed(hash_of(note))
    inputs = (randn(g, *size), label_map(g, (size[0], *labels), size[1]), size[1])
    return Case("upsample_confusion", inputs, options, differentiable=(), note=note)


def hash_of(note: str) -> int:
    """A seed that is the same in every run, unlike hash()."""
    return int.from_bytes(note.encode()[:6], "little")


# The first row of each op is the small one on which gradcheck, opcheck and tracing run.
CASES = [
    sums_case((2, 5, 3, 4), (12, 17), 4, "small"),
    sums_case((2, 37, 7, 11), (53, 89), 19, "prime"),
    sums_case((1, 16, 8, 8), (64, 64), 150, "many-classes", align_corners=True),
    sums_case((1, 3, 9, 8), (4, 3), 3, "labels-smaller"),
    sums_case((3, 1, 1, 1), (1, 1), 1, "one-pixel"),
    update_case((2, 5, 3, 4), (12, 17), 4, "small"),
    update_case((2, 37, 7, 11), (53, 89), 19, "prime", momentum=0.3),
    update_case((1, 16, 8, 8), (64, 64), 150, "many-classes", unbiased=True, align_corners=True),
    update_case((1, 2, 1, 1), (5, 3), 1, "one-feature"),
    aggregate_case((2, 3, 2, 3), 5, "small"),
    aggregate_case((2, 3, 2, 3), 6, "small-philox", philox=True),
    aggregate_case((2, 19, 7, 11), 37, "prime"),
    aggregate_case((1, 150, 9, 13), 129, "many-classes", philox=True),
    aggregate_case((1, 1, 1, 1), 1, "one"),
    attention_case(5, 7, 4, 3, "small"),
    attention_case(37, 53, 16, 16, "prime"),
    attention_case(1, 1, 1, 1, "one-key", scale=0.5),
    attention_case(29, 31, 64, 64, "wide"),
    class_rank_case(2, 5, 4, "small"),
    class_rank_case(2, 5, 4, "small-hard", hard=True),
    class_rank_case(2, 71, 19, "prime"),
    class_rank_case(2, 71, 19, "prime-hard", hard=True),
    class_rank_case(1, 131, 150, "many-classes", scale=6.0),
    class_rank_case(1, 1, 1, "one", scale=0.5),
    cross_entropy_case((2, 4, 3, 4), (12, 17), "small"),
    cross_entropy_case((2, 4, 3, 4), (12, 17), "small-none", weighted=True, reduction="none"),
    cross_entropy_case((2, 19, 7, 11), (53, 89), "prime", weighted=True, label_smoothing=0.1),
    cross_entropy_case((1, 150, 9, 8), (64, 64), "many-classes", align_corners=True),
    cross_entropy_case((1, 150, 9, 8), (64, 64), "none-many", reduction="none"),
    cross_entropy_case((2, 3, 9, 8), (4, 3), "labels-smaller", reduction="sum"),
    cross_entropy_case((2, 5, 6, 7), (6, 7), "equal-size", label_smoothing=1.0, reduction="none"),
    cross_entropy_case((3, 1, 1, 1), (1, 1), "one-class"),
    argmax_case((2, 4, 3, 4), (12, 17), "small"),
    argmax_case((2, 19, 7, 11), (53, 89), "prime", align_corners=True),
    argmax_case((1, 150, 9, 8), (64, 64), "many-classes"),
    argmax_case((2, 3, 9, 8), (4, 3), "smaller"),
    argmax_case((1, 1, 1, 1), (5, 3), "one-class"),
    confusion_case((2, 4, 3, 4), (12, 17), "small"),
    confusion_case((2, 19, 7, 11), (53, 89), "prime", align_corners=True),
    confusion_case((1, 150, 9, 8), (64, 64), "many-classes"),
]
if torch.cuda.is_available():
    CASES += [case.on("cuda") for case in CASES]
SMALL = [c for c in CASES if c.note.startswith("small")]
HARD = replace(aggregate_case((2, 7, 5, 3), 9, "hard", hard=True), differentiable=())


def eager(case: Case, args: list[Any], fused: bool = False) -> Tensor:
    """What PyTorch gives in the dtype of the arguments: the yardstick of the relative rule.

    ``fused`` takes its own fused attention, which rounds otherwise than softmax and products.
    """
    if case.name == "class_feature_sums":
        return _eager_sums(*args, **case.options)
    if case.name == "memory_update":
        from mcibi_fast.ops.memory_update.reference import moving_average

        memory, features, labels = args
        options = dict(case.options)
        momentum, unbiased = options.pop("momentum", 0.1), options.pop("unbiased", False)
        sums = _eager_sums(features, labels, len(memory), **options)
        counts = torch.stack([(labels == k).sum() for k in range(len(memory))])
        return moving_average(memory, sums, counts, momentum, unbiased)
    if case.name == "gaussian_aggregate":
        logits, memory, Z = args
        table = ops.gaussian_table(memory, Z, noise=case.options["noise"]).to(logits.dtype)
        W = torch.softmax(logits, 1)
        return torch.matmul(table.T, W.flatten(2)).unflatten(2, logits.shape[2:])
    if case.name == "upsample_cross_entropy":
        return _eager_cross_entropy(*args, **case.options)
    if case.name == "class_rank_attention":
        query, W = args
        if case.options.get("hard"):
            W = F.one_hot(W.argmax(-1), W.shape[-1]).to(W.dtype)
        args = [query, W, W]
    query, key, value = args
    scale = case.options.get("scale") or query.shape[2] ** -0.5
    if fused:
        heads = (t.unsqueeze(1) for t in args)
        return F.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
    return torch.softmax(scale * query @ key.mT, -1) @ value


def _eager_sums(features: Tensor, labels: Tensor, K: int, align_corners: bool = False) -> Tensor:
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    R = F.interpolate(
        features.to(wide), labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    onehot = torch.stack([labels == k for k in range(K)]).to(wide)
    return torch.einsum("kbhw,bzhw->kz", onehot, R)


def _eager_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    align_corners: bool = False,
    weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    upsampled = F.interpolate(
        logits, labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(upsampled, labels, weight=weight, ignore_index=255, **options)
