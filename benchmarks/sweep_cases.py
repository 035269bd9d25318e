"""The cases of ``benchmarks.sweep``: every op at many sizes, beside what a user of PyTorch writes.

Unlike the other benchmarks, which time sizes of segmentation networks, these include sizes at which
a fused kernel has little to win: tiny maps, two classes, downsampling, 16-bit floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mcibi_fast
from benchmarks import bench_class_rank_attention, bench_confidence_attention
from benchmarks.bench_upsample_argmax import logits_of
from benchmarks.cases import Candidate, Case
from benchmarks.harness import backend_of, randn
from mcibi_fast import ops

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
MOST = 40_000_000  # upsampled values; larger cases would take PyTorch gigabytes
SMALL = 4_000_000  # up to here results are compared with float64 as well
MAPS = ((2, 4), (4, 32), (16, 128), (32, 256), (64, 512), (64, 64), (64, 16), (128, 64))
CLASSES = (2, 19, 150, 1000)
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
ALL = ((f32, CONTIGUOUS), (bf16, CONTIGUOUS), (f32, CHANNELS_LAST), (bf16, CHANNELS_LAST))
SOME = ((f32, CONTIGUOUS), (bf16, CHANNELS_LAST))
FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Form:
    """An op at one size: how PyTorch and we compute it from the same inputs.

    Args:
        op: the op's name.
        variant: what distinguishes it from other forms of the op, or "".
        pytorch: what a user of PyTorch writes, in one or several ways; the fastest counts.
        ours: the op.
        inputs: the tensors that the dtype applies to.
        explained: the positional and keyword arguments of the op, for ``explain``.
        values: how many intermediate values PyTorch forms.
    """

    op: str
    variant: str
    sizes: dict[str, int]
    pytorch: dict[str, Callable[..., Any]]
    ours: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    explained: tuple[tuple[Any, ...], dict[str, Any]]
    values: int


def labels_of(K: int, size: int) -> Tensor:
    """Labels in blocks, a tenth of which are ignored."""
    g = torch.Generator().manual_seed(K + size)
    blocks = max(size // 16, 1)
    coarse = torch.randint(0, K, (1, 1, blocks, blocks), generator=g).float()
    coarse[torch.rand(coarse.shape, generator=g) < 0.1] = -1
    coarse[0, 0, 0, 0] = 0
    return F.interpolate(coarse, (size, size)).squeeze(1).long()


def _smooth(K: int, h: int) -> Tensor:
    return logits_of("smooth" if h >= 8 else "noise", K, h, f32, "cpu")


# ---- the ops -------------------------------------------------------------------------------------


def argmax(K: int, h: int, H: int, cast: Callable[[Tensor], Tensor]) -> Form:
    logits = cast(_smooth(K, h))
    return Form(
        "upsample_argmax",
        "",
        {"K": K, "map": h, "labels": H},
        {"pytorch": lambda x: F.interpolate(x, (H, H), mode="bilinear").argmax(1)},
        lambda x: ops.upsample_argmax(x, (H, H)),
        (logits,),
        ((logits, (H, H)), {}),
        K * H * H,
    )


def confusion(K: int, h: int, H: int, cast: Callable[[Tensor], Tensor]) -> Form:
    logits, labels = cast(_smooth(K, h)), labels_of(K, H)

    def pytorch(x: Tensor) -> Tensor:
        valid = labels != -1
        prediction = F.interpolate(x, (H, H), mode="bilinear").argmax(1)
        pairs = labels[valid] * K + prediction[valid]
        return torch.bincount(pairs, minlength=K * K).view(K, K)

    return Form(
        "upsample_confusion",
        "",
        {"K": K, "map": h, "labels": H},
        {"pytorch": pytorch},
        lambda x: ops.upsample_confusion(x, labels, K, ignore_index=-1),
        (logits,),
        ((logits, labels, K), {"ignore_index": -1}),
        K * H * H,
    )


def cross_entropy(
    K: int, h: int, H: int, cast: Callable[[Tensor], Tensor], weighted: bool = False
) -> Form:
    logits, labels = cast(3 * randn(1, K, h, h, device="cpu")), labels_of(K, H)
    weight = torch.linspace(0.5, 1.5, K) if weighted else None

    def pytorch(x: Tensor) -> Tensor:
        upsampled = F.interpolate(x, (H, H), mode="bilinear")
        w = None if weight is None else weight.to(x.dtype)
        return F.cross_entropy(upsampled, labels, w, ignore_index=-1)

    options: dict[str, Any] = {"weight": weight, "ignore_index": -1}
    return Form(
        "upsample_cross_entropy",
        "weighted" if weighted else "",
        {"K": K, "map": h, "labels": H},
        {"pytorch": pytorch},
        lambda x: ops.upsample_cross_entropy(x, labels, **options),
        (logits,),
        ((logits, labels), options),
        K * H * H,
    )


def class_sums(K: int, h: int, H: int, cast: Callable[[Tensor], Tensor], Z: int = 128) -> Form:
    features, labels = cast(randn(1, Z, h, h, device="cpu")), labels_of(K, H)

    def pytorch(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x if x.dtype == f64 else x.float()
        R = F.interpolate(wide, (H, H), mode="bilinear").movedim(1, -1).flatten(0, 2)
        rows = labels.flatten()
        rows = torch.where(rows == -1, K, rows)
        sums = R.new_zeros(K + 1, Z).index_add_(0, rows, R)
        return sums[:-1], torch.bincount(rows, minlength=K + 1)[:-1]

    return Form(
        "class_feature_sums",
        "",
        {"K": K, "map": h, "labels": H, "Z": Z},
        {"pytorch": pytorch},
        lambda x: ops.class_feature_sums(x, labels, K, ignore_index=-1),
        (features,),
        ((features, labels, K), {"ignore_index": -1}),
        Z * H * H,
    )


def class_rank(K: int, N: int, cast: Callable[[Tensor], Tensor], hard: bool = False) -> Form:
    query = cast(3 * randn(1, N, K, device="cpu"))
    weights = cast(torch.softmax(3 * randn(1, N + 1, K, device="cpu")[:, 1:], -1))
    scale = bench_class_rank_attention.SCALE

    def keys(w: Tensor) -> Tensor:
        return F.one_hot(w.argmax(-1), K).to(w.dtype) if hard else w

    options = {"scale": scale, "hard": hard}
    return Form(
        "class_rank_attention",
        "hard" if hard else "",
        {"K": K, "N": N},
        {
            "sdpa": lambda q, w: bench_class_rank_attention.sdpa(q, keys(w)),
            "eager": lambda q, w: bench_class_rank_attention.eager(q, keys(w)),
        },
        lambda q, w: ops.class_rank_attention(q, w, **options),
        (query, weights),
        ((query, weights), options),
        N * N,
    )


def confidence(D: int, N: int, cast: Callable[[Tensor], Tensor], maps: bool = False) -> Form:
    inputs = tuple(cast(randn(1, N + i, D, device="cpu")[:, i:]) for i in range(3))
    if maps:
        inputs = tuple(t.mT.contiguous().mT for t in inputs)
    return Form(
        "confidence_attention",
        "maps" if maps else "",
        {"D": D, "N": N},
        {"sdpa": bench_confidence_attention.sdpa, "eager": bench_confidence_attention.eager},
        ops.confidence_attention,
        inputs,
        (inputs, {}),
        N * N * D // 64,
    )


def aggregate(K: int, h: int, Z: int, cast: Callable[[Tensor], Tensor]) -> Form:
    logits = cast(3 * randn(1, K, h, h, device="cpu"))
    memory = torch.stack([randn(K, device="cpu"), randn(K + 1, device="cpu")[1:].abs()], 1)
    noise = randn(K, Z, device="cpu")

    def pytorch(x: Tensor) -> Tensor:
        table = (memory[:, :1] + memory[:, 1:] * noise).to(x.dtype)
        return torch.matmul(table.T, torch.softmax(x, 1).flatten(2)).unflatten(2, x.shape[2:])

    return Form(
        "gaussian_aggregate",
        "",
        {"K": K, "map": h, "Z": Z},
        {"pytorch": pytorch},
        lambda x: ops.gaussian_aggregate(x, memory, Z, noise=noise),
        (logits,),
        ((logits, memory, Z), {"noise": noise}),
        Z * h * h,
    )


# ---- the grid ------------------------------------------------------------------------------------


def cases(quick: bool = False) -> Iterator[tuple[str, Callable[[], Case | None]]]:
    """(op, function that makes a case), the function so that one case is in memory at a time.

    A function returns None where PyTorch would need gigabytes.
    """
    for make, dtype, layout, direction in _grid(quick):
        op = make.func.__name__
        yield op, functools.partial(case, make, dtype, layout, direction)


def _grid(quick: bool) -> Iterator[tuple[Any, torch.dtype, str, str]]:
    maps, classes = (((2, 4), (16, 128), (64, 16)), (2, 19)) if quick else (MAPS, CLASSES)
    every = SOME if quick else ALL
    sizes = [(K, h, H) for h, H in maps for K in classes]
    for K, h, H in sizes:
        for dtype, layout in (*every, *([(f64, CONTIGUOUS)] if K == 19 else [])):
            yield functools.partial(argmax, K, h, H), dtype, layout, FORWARD
            yield functools.partial(cross_entropy, K, h, H), dtype, layout, FORWARD
            yield functools.partial(cross_entropy, K, h, H), dtype, layout, BOTH
            yield functools.partial(class_sums, K, h, H), dtype, layout, FORWARD
        for dtype, layout in SOME:
            yield functools.partial(confusion, K, h, H), dtype, layout, FORWARD
            if K in (2, 19):
                yield functools.partial(class_sums, K, h, H), dtype, layout, BOTH
                for direction in (FORWARD, BOTH):
                    form = functools.partial(cross_entropy, K, h, H, weighted=True)
                    yield form, dtype, layout, direction
    for dtype in (f32, bf16):
        for direction in (FORWARD, BOTH):
            for N in (1, 256) if quick else (1, 16, 256, 1024, 4096):
                for K in (2, 19) if quick else (2, 19, 150):
                    yield functools.partial(class_rank, K, N), dtype, CONTIGUOUS, direction
                    if not quick and N != 16:
                        form = functools.partial(class_rank, K, N, hard=True)
                        yield form, dtype, CONTIGUOUS, direction
                for D in (64,) if quick else (64, 256, 512):
                    for transposed in (False, True):
                        if transposed and D != 256:
                            continue
                        form = functools.partial(confidence, D, N, maps=transposed)
                        yield form, dtype, CONTIGUOUS, direction
    for K in classes:
        for h in (1, 16) if quick else (1, 8, 32, 64):
            for Z in (64,) if quick else (64, 512):
                for dtype, layout in ALL[:2] if quick else ALL:
                    for direction in (FORWARD, BOTH):
                        yield functools.partial(aggregate, K, h, Z), dtype, layout, direction


def case(make: Callable[..., Form], dtype: torch.dtype, layout: str, direction: str) -> Case | None:
    """The case of one form, dtype, layout and direction."""
    form = make(cast=functools.partial(_cast, dtype=dtype, layout=layout))
    if form.values > MOST:
        return None
    runs = {**form.pytorch, "ours": form.ours}
    args, options = form.explained
    sizes = {**form.sizes, "variant": form.variant, "layout": layout, "direction": direction}
    backend = backend_of(form.op, *args, **options)
    return Case(
        form.op,
        sizes,
        dtype,
        [
            Candidate(
                name,
                functools.partial(_run, run, form.inputs, direction),
                backend if name == "ours" else "",
            )
            for name, run in runs.items()
        ],
        bytes=0,
        flops=0,
        truth=functools.partial(_truth, form, direction) if form.values <= SMALL else None,
        tolerance=0.1 if dtype == bf16 and form.values > SMALL else None,
    )


def _cast(t: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    t = t.to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if layout == CHANNELS_LAST else t


def _run(run: Callable[..., Any], inputs: tuple[Tensor, ...], direction: str) -> Any:
    if direction == FORWARD:
        return run(*inputs)
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = run(*leaves)
    result = result if isinstance(result, Tensor) else result[0]
    grad = _cotangent(result.shape, result.dtype)
    grads = torch.autograd.grad(result, leaves, grad, allow_unused=True)
    return [g for g in grads if g is not None]


@functools.lru_cache(maxsize=2)
def _cotangent(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (1 + torch.arange(shape.numel()) % 7).view(shape).to(dtype) / 8


def _truth(form: Form, direction: str) -> Any:
    """By the reference in float64."""
    with mcibi_fast.backend("reference"):
        return _run(form.ours, tuple(t.double() for t in form.inputs), direction)
