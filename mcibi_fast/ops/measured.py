"""Which way to compute is faster on a CPU, as measured.

All such rules are in this file. Each was read off ``mcibi-fast bench sweep`` (docs/speed-cpu.md) on
one thread of an AMD EPYC with AVX-512 and bfloat16 products (Zen 4) or, of the reduced maps, of an
Intel Xeon, and says what plain operators of PyTorch allocate beyond the result, which is bounded.
They hold where no backend is forced. Those that choose such operators return the reason as
``explain`` prints it, or None where the op's own kernel is faster.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Attention: our kernel packs its operands for many queries.
FEW_SCORES = 1024
_FEW_SCORES = f"scaled_dot_product_attention is faster up to {FEW_SCORES} scores"

# Attention by products in bfloat16, which form the scores. From FORMED_FROM scores on they are
# faster than PyTorch's fused attention, by up to 2, and from WIDE classes on than our class-rank
# attention, by 1.2 to 2.2 at 150 (at 19 ours is faster by 1.3 to 1.7).
FORMED_FROM = 2**14
FORMED_MOST = 2**22  # 8 MiB of scores in bfloat16, 16 MiB in float32; twice that with the softmax
WIDE, WIDE_MOST = 64, 2**24  # 32 MiB of scores, and as much of the softmax

# Not here: aggregation by softmax and product, which is 1.0 to 1.9 times faster for a few pixels of
# many classes, and 1.2 to 1.9 times for wide rows in bfloat16. Its bits depend on the number of
# threads.


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def few_scores(query: Tensor, hard: bool) -> str | None:
    """Soft class-rank attention: whether ``scaled_dot_product_attention`` is faster."""
    B, N, _ = query.shape
    if hard or B * N * N > FEW_SCORES:
        return None
    return _FEW_SCORES


def wide_rows(query: Tensor, hard: bool) -> str | None:
    """Soft class-rank attention: whether products that form the scores are faster."""
    B, N, K = query.shape
    if hard or query.dtype != torch.bfloat16 or K < WIDE or not query.is_cpu:
        return None
    if not FORMED_FROM <= B * N * N <= WIDE_MOST or not multiplies_bfloat16():
        return None
    return f"{K} classes in bfloat16: plain products are faster from {WIDE} on"


def is_reduced(logits: Tensor, labels: Tensor) -> bool:
    """Mean and sum of the cross entropy, for maps larger than the labels: whether a backward that
    forms the few exponentials again is faster than a gradient that is computed with the loss and
    multiplied by the cotangent later, one pass more over the map."""
    return logits.size(2) * logits.size(3) > labels.size(1) * labels.size(2)
