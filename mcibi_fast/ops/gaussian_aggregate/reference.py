"""Gaussian sampling and aggregation, Eqs. 11-12 and Algorithm 1: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, in int64 without overflowing into the sign."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with ten rounds (Salmon et al., SC 2011).

    Args:
        counter: (..., 4) int64 holding unsigned 32-bit words.
        key: (2,) int64, likewise.

    Returns:
        (..., 4) int64 holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def philox_normal(num_classes: int, channels: int, state: Tensor) -> Tensor:
    """Standard normal numbers (K, Z) in float32 for a Philox state (seed, step).

    Key: the seed. Counter: (z // 4, k, step, 0). Box-Muller on the pairs of the four words.
    """
    seed, step = state.unbind()
    quads = (channels + 3) // 4
    k, quad = torch.meshgrid(
        torch.arange(num_classes, device=state.device),
        torch.arange(quads, device=state.device),
        indexing="ij",
    )
    counter = torch.stack([quad, k, (step & _MASK).expand_as(k), torch.zeros_like(k)], dim=-1)
    key = torch.stack([seed & _MASK, (seed >> 32) & _MASK])
    u = (philox4x32_10(counter, key).double() + 0.5) / 2**32  # (K, quads, 4), never 0 nor 1
    radius = torch.sqrt(-2 * torch.log(u[..., 0::2]))
    angle = 2 * math.pi * u[..., 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :channels].float()


def gaussian_table(memory: Tensor, channels: int, noise: Tensor) -> Tensor:
    """C_dl (Eq. 11), (K, Z): mean + std * eps, rounded after each of the two operations.

    Args:
        memory: M, (K, 2).
        channels: Z.
        noise: eps (K, Z) in float32 or float64, whose dtype the table gets, or the int64 state
            of a Philox generator (float32).
    """
    eps = philox_normal(len(memory), channels, noise) if noise.dtype == torch.int64 else noise
    mean, std = memory.to(eps.dtype)[:, :1], memory.to(eps.dtype)[:, 1:]
    return mean + std * eps


def gaussian_aggregate(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    """C~_bi (Eq. 12): each pixel's class representations, weighted by its class probabilities.

    Args:
        logits: (B, K, h, w); W is their softmax over K, or with ``hard`` the one-hot vector of
            the largest, the first on ties.

    Returns:
        (B, Z, h, w) in the dtype of the logits, and the log-sum-exp of the logits over K, (B, h w)
        (with ``hard`` their maximum), which has no gradient.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.to(dtype)
    C_dl = gaussian_table(memory, channels, noise).to(dtype)
    if hard:
        W = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        statistic = scores.amax(1)
    else:
        W = torch.softmax(scores, dim=1)
        statistic = torch.logsumexp(scores, dim=1)
    out = torch.einsum("bkhw,kz->bzhw", W, C_dl)
    return out.to(logits.dtype), statistic.detach().flatten(1)
