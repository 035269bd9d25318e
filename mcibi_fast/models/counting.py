"""Counts how much a module computes, by two rules; on the meta device counting costs nothing.

The *printed* count follows the released code, whose figures the paper's Table 7 prints as FLOPs. It
counts multiply-adds but leaves out every matrix product: convolutions with their bias, two
operations per element of a batch norm, one per element of a ReLU module, and one per element that
an adaptive pooling module reads. The *true* count is the multiply-adds of convolutions and of all
matrix products, including those of the attentions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mcibi_fast.ops  # noqa: F401 - defines torch.ops.mcibi_fast


class Counts(NamedTuple):
    """``parameters``: number of parameters; ``printed`` and ``true``: multiply-adds of one call."""

    parameters: int
    printed: int
    true: int


@torch.no_grad()
def count(
    module: nn.Module, *inputs: Any, repeated: Sequence[nn.Module] = (), **options: Any
) -> Counts:
    """Counts one call of a module.

    Args:
        module: a module in evaluation mode, on the device of the inputs ("meta" is enough).
        inputs: the inputs it is called with.
        repeated: parts that the published code runs twice on the same input, but this module runs
            once. They are counted twice.
        options: further arguments of the call.
    """
    again = {m for part in repeated for m in part.modules()}
    printed = repeated_true = 0

    def hook(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal printed, repeated_true
        printed += _printed(part, args[0], output) * (2 if part in again else 1)
        if part in again and isinstance(part, nn.Conv2d):
            repeated_true += output.numel() * part.weight[0].numel()

    handles = [part.register_forward_hook(hook) for part in module.modules()]
    try:
        with FlopCounterMode(display=False, custom_mapping=_OUR_OPS) as counter:
            module(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    parameters = sum(p.numel() for p in module.parameters())
    return Counts(parameters, printed, counter.get_total_flops() // 2 + repeated_true)


def _printed(part: nn.Module, given: Tensor, output: Tensor) -> int:
    if isinstance(part, nn.Conv2d):
        return output.numel() * (part.weight[0].numel() + (part.bias is not None))
    if isinstance(part, nn.BatchNorm2d):
        return 2 * given.numel()
    if isinstance(part, nn.ReLU):
        return output.numel()
    if isinstance(part, nn.AdaptiveAvgPool2d):
        return given.numel()
    return 0


# Operations, two per multiply-add, from the shapes of the arguments.


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[1] * key[1] * (query[2] + value[2])


def _class_rank_attention(query: Any, weights: Any, *_: Any, **__: Any) -> int:
    return _attention(query, weights, weights)


def _aggregate(logits: Any, memory: Any, channels: int, *_: Any, **__: Any) -> int:
    batch, classes, height, width = logits
    return 2 * batch * height * width * classes * channels


_OUR_OPS = {
    torch.ops.mcibi_fast.confidence_attention: _attention,
    torch.ops.mcibi_fast.class_rank_attention: _class_rank_attention,
    torch.ops.mcibi_fast.gaussian_aggregate: _aggregate,
}
