"""Which way to compute is faster on a CPU, as measured.

All such rules are in this file. Each was read off ``mcibi-fast bench sweep`` (docs/speed-cpu.md) on
one thread of an AMD EPYC with AVX-512 and bfloat16 products (Zen 4) or, of the reduced maps and of
attention in float32 and with gradients, of an Intel Xeon without such products, and says what plain
operators of PyTorch allocate beyond the result, which is bounded.
They hold where no backend is forced. Those that choose such operators return the reason as
``explain`` prints it, or None where the op's own kernel is faster.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Attention: our kernel packs its operands for many queries.
FEW_SCORES = 1024

# Attention by products that form the scores. From FORMED_FROM scores on they are faster than
# PyTorch's fused attention: in bfloat16, on CPUs that multiply it, by up to 2; for views of maps by
# 1.1 to 1.4; with gradients, on one thread and on two, by 1.06 at FORMED_CHANNELS channels and 1.2
# at 512 (at 64, on one thread, the fused one is faster by 1.1 to 1.3). In bfloat16 they are also
# faster than our class-rank attention from WIDE classes on, by 1.2 to 2.2 at 150 (at 19 ours is
# faster by 1.3 to 1.7).
FORMED_FROM = 2**14
FORMED_MOST = 2**22  # 8 MiB of scores in bfloat16, 16 MiB in float32; twice that with the softmax
FORMED_CHANNELS = 192
WIDE, WIDE_MOST = 64, 2**24  # 32 MiB of scores, and as much of the softmax

# Class-rank attention in float32 with gradients: PyTorch's fused attention is faster than ours up
# to FEW_FOLLOWED scores, by 1.1 to 1.7, and from WIDE_FOLLOWED classes on by 1.1 at 60 and 1.2 to
# 1.3 at 150 and 256 (at 19 ours is faster by 1.2). From MANY_PIXELS on it depends on the processor:
# at 150 classes PyTorch's is faster by 1.2 on the Xeon, ours by 1.1 on the EPYC.
FEW_FOLLOWED = 4096
WIDE_FOLLOWED, MANY_PIXELS = 60, 4096

# Aggregation in float32 with gradients, of at most FEW_PIXELS pixels with a table of at least
# LARGE_TABLE numbers: a softmax and a product are 1.05 to 1.8 times faster (2.9 for 16 pixels of
# 1000 classes); with smaller tables they are as fast as ours. They form the softmax and the table.
# Not without gradients, where they are up to 1.2 times faster, and not in bfloat16: the bits of
# such a product depend on the number of threads.
FEW_PIXELS = 144
LARGE_TABLE = 2**13


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of this dtype."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows one of the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


WIDENED_FROM = 128  # scores: for fewer the copies take longer than they save


def widens(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Attention by PyTorch's operators: whether float32 is faster than the tensors' dtype, of which
    the CPU has no products: with gradients by 2.5 in bfloat16 and by 10 to 20 in float16, and for
    views of maps, which the fused attention does not take. It copies the tensors. For rows without
    gradients the fused attention is as fast in their dtype."""
    if not query.is_cpu or multiplies(query.dtype):
        return False
    if query.size(0) * query.size(1) * key.size(1) < WIDENED_FROM:
        return False
    tensors = query, key, value
    return any(t.stride(2) != 1 for t in tensors) or wants_gradient(*tensors)


def fused(query: Tensor, weights: Tensor, hard: bool) -> str | None:
    """Soft class-rank attention: whether ``scaled_dot_product_attention`` is faster."""
    B, N, K = query.shape
    if hard:
        return None
    if B * N * N <= FEW_SCORES:
        return f"scaled_dot_product_attention is faster up to {FEW_SCORES} scores"
    if query.dtype != torch.float32 or not wants_gradient(query, weights):
        return None
    if B * N * N <= FEW_FOLLOWED:
        return f"with gradients scaled_dot_product_attention is faster up to {FEW_FOLLOWED} scores"
    if K < WIDE_FOLLOWED or N >= MANY_PIXELS:
        return None
    return (
        f"{K} classes with gradients: scaled_dot_product_attention is faster from "
        f"{WIDE_FOLLOWED} on for less than {MANY_PIXELS} pixels"
    )


def wide_rows(query: Tensor, hard: bool) -> str | None:
    """Soft class-rank attention: whether products that form the scores are faster."""
    B, N, K = query.shape
    if hard or query.dtype != torch.bfloat16 or K < WIDE or not query.is_cpu:
        return None
    if not FORMED_FROM <= B * N * N <= WIDE_MOST or not multiplies(torch.bfloat16):
        return None
    return f"{K} classes in bfloat16: plain products are faster from {WIDE} on"


def many_pixels(logits: Tensor, channels: int) -> str | None:
    """Aggregation: whether our kernel is faster than a softmax and a product."""
    if not wants_gradient(logits):
        return "no gradient is wanted"
    if logits.dtype not in (torch.float32, torch.float64):
        return f"{logits.dtype} is not what it pays off in"
    B, K, h, w = logits.shape
    if B * h * w > FEW_PIXELS or K * channels < LARGE_TABLE:
        return (
            f"{B * h * w} pixels and a table of {K * channels} numbers; it pays off up to "
            f"{FEW_PIXELS} pixels from {LARGE_TABLE} numbers on"
        )
    return None


def is_reduced(logits: Tensor, labels: Tensor) -> bool:
    """Mean and sum of the cross entropy, for maps larger than the labels: whether a backward that
    forms the few exponentials again is faster than a gradient that is computed with the loss and
    multiplied by the cotangent later, one pass more over the map."""
    return logits.size(2) * logits.size(3) > labels.size(1) * labels.size(2)
