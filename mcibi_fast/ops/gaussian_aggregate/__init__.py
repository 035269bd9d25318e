"""Gaussian sampling and aggregation, Eqs. 11-12 and Algorithm 1, in one kernel.

out[:, z] = sum_k softmax(logits)_k (mu_k + sigma_k eps_kz): every pixel gathers the sampled class
representations C_dl by its class probabilities W. The kernels keep the table and the softmax of a
tile of pixels on the chip; neither is written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcibi_fast.ops import checks
from mcibi_fast.ops.compiled import cpu_kernel, cuda_kernel
from mcibi_fast.ops.dispatch import (
    Kernel,
    Op,
    always,
    no_gradient_of,
    recompute_gradients,
)
from mcibi_fast.ops.gaussian_aggregate import plain, reference
from mcibi_fast.ops.layout import layout
from mcibi_fast.ops.philox import Philox
from mcibi_fast.ops.snapshot import snapshot


def gaussian_aggregate(
    logits: Tensor,
    memory: Tensor,
    channels: int,
    *,
    noise: Tensor | Philox,
    hard: bool = False,
) -> Tensor:
    """C~_bi (Eq. 12): the class representations sampled from the memory, gathered by each pixel.

    Differentiable once, in the logits; the memory is not learnt. Allocates the result and the
    log-sum-exp of each pixel; on CUDA in 16 bits also the table, (K, Z), and on the CPU, where
    that is faster, the table and the softmax of at most 144 pixels (``mcibi_fast.explain`` says
    where; only there the bits may depend on the number of threads). Under autocast the logits are
    cast to its dtype.

    Args:
        logits: (B, K, h, w) before the softmax, float32, float64, bfloat16 or float16, any
            strides; -inf allowed. To gather by given probabilities pass their logarithm.
        memory: M, (K, 2) in float32 or float64; column 0 the mean, column 1 the standard
            deviation.
        channels: Z.
        noise: eps, a (K, Z) tensor in float32 or float64, the dtype in which the table
            mean + std * eps is then formed, rounded after each of the two operations (as the
            released code samples); or ``Philox(state)``, drawn inside the kernel.
        hard: gather by the one-hot vector of the largest logit (the first on ties) instead of
            the softmax. Has no gradient.

    Returns:
        (B, Z, h, w) in the dtype and memory format of the logits.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    return AGGREGATE.first(*_prepare_aggregate(logits, memory, channels, noise, hard))


def gaussian_table(memory: Tensor, channels: int, *, noise: Tensor | Philox) -> Tensor:
    """C_dl (Eq. 11): the sampled class representations, for looking at (no gradient).

    Args:
        memory: M, (K, 2) in float32 or float64.
        channels: Z.
        noise: as in ``gaussian_aggregate``.

    Returns:
        (K, Z) in the dtype of the noise; float32 for ``Philox``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    return TABLE(*_prepare_table(memory, channels, noise))


def _prepare_table(memory: Tensor, channels: int, noise: Tensor | Philox) -> tuple[Any, ...]:
    checks.memory(memory)
    checks.positive("channels", channels)
    if isinstance(noise, Philox):
        eps = noise.state
    else:
        checks.tensor("noise", noise, "K, Z", (torch.float32, torch.float64))
        if tuple(noise.shape) != (memory.shape[0], channels):
            raise ValueError(
                f"noise: expected shape (K, Z) = {(memory.shape[0], channels)}, "
                f"got {tuple(noise.shape)}"
            )
        eps = noise
    checks.same_device(memory=memory, noise=eps)
    return memory, channels, eps


def _prepare_aggregate(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor | Philox, hard: bool
) -> tuple[Any, ...]:
    checks.tensor("logits", logits, "B, K, h, w", checks.FLOATS)
    memory, channels, eps = _prepare_table(memory, channels, noise)
    if logits.shape[1] != memory.shape[0]:
        raise ValueError(
            f"logits: {logits.shape[1]} classes, but the memory has {memory.shape[0]} rows"
        )
    if 0 in logits.shape:
        raise ValueError(f"logits: no dimension may be empty, got {tuple(logits.shape)}")
    checks.same_device(logits=logits, memory=memory)
    (logits,) = checks.under_autocast(logits)
    return logits, memory, channels, eps, hard


def _table_reference(memory: Tensor, channels: int, noise: Tensor) -> Tensor:
    return reference.gaussian_table(memory, channels, noise).contiguous()


TABLE = Op(
    "gaussian_table",
    [cuda_kernel, cpu_kernel, Kernel("reference", _table_reference, always)],
    lambda memory, channels, noise: memory.new_empty(
        (memory.shape[0], channels),
        dtype=noise.dtype if noise.is_floating_point() else torch.float32,
    ),
    public=gaussian_table,
    prepare=_prepare_table,
)
TABLE.without_gradient(reference.gaussian_table)


def _aggregate_fake(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = logits.shape
    out = logits.new_empty((batch, channels, height, width)).to(memory_format=layout(logits))
    return out, logits.new_empty((batch, height * width), dtype=checks.wide(logits.dtype))


def _aggregate_reference(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    out, statistic = reference.gaussian_aggregate(logits, memory, channels, noise, hard)
    return out.contiguous(memory_format=layout(logits)), statistic


def _plain(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    statistic = logits.detach().to(checks.wide(logits.dtype)).logsumexp(1).flatten(1)
    return _plain_result(logits, memory, channels, noise, hard), statistic


def _plain_result(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool
) -> Tensor:
    return plain.aggregate(logits, TABLE(memory, channels, noise))


AGGREGATE = Op(
    "gaussian_aggregate",
    [
        Kernel(
            "pytorch",
            _plain,
            plain.why_not,
            composite=True,
            slower=plain.slower,
            first=_plain_result,
        ),
        cuda_kernel,
        cpu_kernel,
        Kernel("reference", _aggregate_reference, always, composite=True),
    ],
    _aggregate_fake,
    public=gaussian_aggregate,
    prepare=_prepare_aggregate,
)


def _backward_reference(
    grad: Tensor, logits: Tensor, lse: Tensor, memory: Tensor, noise: Tensor
) -> Tensor:
    def aggregate(scores: Tensor) -> Tensor:
        return _aggregate_reference(scores, memory, grad.shape[1], noise, hard=False)[0]

    return recompute_gradients(aggregate, [logits], grad)[0].contiguous(
        memory_format=layout(logits)
    )


AGGREGATE_BACKWARD = Op(
    "gaussian_aggregate_backward",
    [cuda_kernel, cpu_kernel, Kernel("reference", _backward_reference, always)],
    lambda grad, logits, lse, memory, noise: torch.empty_like(
        logits,
        memory_format=layout(logits),
    ),
)
AGGREGATE_BACKWARD.refuse_gradient()


class GaussianAggregate(torch.autograd.Function):
    """Saves the logits and their log-sum-exp; the softmax and the table are formed again.

    The memory and the Philox state are saved as copies of a few numbers: a training step updates
    both in place between the forward and the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool
    ) -> tuple[Tensor, Tensor]:
        # The forward itself runs on the copies: one that only the backward uses a compiler would
        # make there.
        memory = snapshot(memory)
        noise = noise if noise.is_floating_point() else snapshot(noise)
        out, lse = AGGREGATE.below_autograd(logits, memory, channels, noise, hard)
        ctx.save_for_backward(logits, lse, memory, noise)
        no_gradient_of(ctx, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 5
        logits, lse, memory, noise = ctx.saved_tensors
        return AGGREGATE_BACKWARD(grad, logits, lse, memory, noise), None, None, None, None


AGGREGATE.differentiable(
    GaussianAggregate.apply,
    lambda logits, memory, channels, noise, hard: logits.requires_grad and not hard,
    reference.gaussian_aggregate,
)
