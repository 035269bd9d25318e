"""Learnt queries that a transformer turns into masks and their classes (MaskFormer)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.rows import rows


class MaskQueries(nn.Module):
    """A transformer decoder: learnt queries attend to a map; each becomes a mask and a class.

    Each layer has self-attention, attention to the map and a feed-forward part, each followed by
    layer norm. There is no encoder. The first layer's input is zero; the learnt queries are added
    to the attentions' queries and keys, as the positions of the pixels are.

    Args:
        in_channels: channels of the map.
        mask_channels: channels of the masks' embeddings.
        num_classes: K; one more class means "no object".
        channels: width of the transformer.
        queries: number of queries.
        heads: number of attention heads.
        layers: number of layers.
        hidden_channels: hidden channels of the feed-forward part.
        dropout: probability in training.

    Shape: (B, in_channels, h, w) -> class logits (layers, B, queries, K + 1) and embeddings
        (layers, B, queries, mask_channels).
    """

    def __init__(
        self,
        in_channels: int,
        mask_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        queries: int = 100,
        heads: int = 8,
        layers: int = 6,
        hidden_channels: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, channels, 1)
        self.queries = nn.Embedding(queries, channels)
        self.layers = nn.ModuleList(
            QueryLayer(channels, heads, hidden_channels, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.classes = nn.Linear(channels, num_classes + 1)
        self.masks = nn.ModuleList(
            nn.Linear(channels, width) for width in (channels, channels, mask_channels)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        pixels = rows(self.project(features))
        positions = sine_positions(features.shape[2:], pixels.shape[2], features.device)
        keys = pixels + positions.to(pixels.dtype)
        queries = self.queries.weight.repeat(pixels.shape[0], 1, 1)
        found, results = torch.zeros_like(queries), []
        for layer in self.layers:
            found = layer(found, queries, keys, pixels)
            results.append(self.norm(found))
        embeddings = stacked = torch.stack(results)
        for i, linear in enumerate(self.masks):
            embeddings = linear(embeddings.relu() if i else embeddings)
        return self.classes(stacked), embeddings


class QueryLayer(nn.Module):
    """One layer of :class:`MaskQueries`."""

    def __init__(self, channels: int, heads: int, hidden_channels: int, dropout: float) -> None:
        super().__init__()
        self.among, self.to_map = (HeadsAttention(channels, heads, dropout) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, hidden_channels),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_channels, channels),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of all matrices by Glorot and Bengio's rule, no bias in attentions."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            elif "project" in name:
                nn.init.zeros_(parameter)

    def forward(self, found: Tensor, queries: Tensor, keys: Tensor, pixels: Tensor) -> Tensor:
        """(B, Q, C), (B, Q, C), pixels with and without positions (B, N, C) -> (B, Q, C)."""
        placed = found + queries
        found = self.norms[0](found + self.dropout(self.among(placed, placed, found)))
        seen = self.to_map(found + queries, keys, pixels)
        found = self.norms[1](found + self.dropout(seen))
        return self.norms[2](found + self.dropout(self.feed_forward(found)))


class HeadsAttention(nn.Module):
    """Attention with several heads, with the parameters of ``nn.MultiheadAttention``.

    That module's own code for evaluation cannot be exported to ONNX.

    Shape: queries (B, Q, C), keys (B, N, C), values (B, N, C) -> (B, Q, C).
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.project_in = nn.Linear(channels, 3 * channels)  # of queries, keys and values
        self.project_out = nn.Linear(channels, channels)
        self.heads = heads
        self.dropout = dropout

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(
            (queries, keys, values),
            self.project_in.weight.chunk(3),
            self.project_in.bias.chunk(3),
            strict=True,
        )
        q, k, v = (F.linear(*part).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.project_out(seen.transpose(1, 2).flatten(2))


def sine_positions(size: torch.Size, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of the pixels' relative positions: (h w, channels), float32.

    The first half of the channels is that of y, the second that of x.

    Args:
        size: h, w.
        channels: an even number.
        device: of the result.
    """
    half = channels // 2
    order = torch.arange(half, dtype=torch.float32, device=device)
    wavelength = 10000 ** (2 * (order // 2) / half)
    sides = []
    for side in size:
        at = torch.arange(1, side + 1, dtype=torch.float32, device=device)
        angles = (at / (side + 1e-6) * (2 * math.pi))[:, None] / wavelength
        pairs = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2)
        sides.append(pairs.flatten(1))
    y, x = sides
    both = [y[:, None].expand(-1, len(x), -1), x[None].expand(len(y), -1, -1)]
    return torch.cat(both, dim=2).flatten(0, 1)


def mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss (alpha 0.25, gamma 2) and Dice loss of every mask with every target.

    Args:
        logits: (Q, P), of Q masks at P pixels.
        targets: (M, P), 0 or 1.

    Returns:
        Two tensors (Q, M).
    """
    probability = logits.sigmoid()
    positive = 0.25 * (1 - probability) ** 2 * F.softplus(-logits)
    negative = 0.75 * probability**2 * F.softplus(logits)
    focal = (positive @ targets.mT + negative @ (1 - targets).mT) / logits.shape[1]
    shared = 2 * probability @ targets.mT
    sizes = probability.sum(1)[:, None] + targets.sum(1)
    return focal, 1 - (shared + 1) / (sizes + 1)


def mask_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same losses of each mask with its own target: (M, P), (M, P) -> two tensors (M,)."""
    probability = logits.sigmoid()
    positive = 0.25 * (1 - probability) ** 2 * F.softplus(-logits) * targets
    negative = 0.75 * probability**2 * F.softplus(logits) * (1 - targets)
    shared = 2 * (probability * targets).sum(1)
    dice = 1 - (shared + 1) / (probability.sum(1) + targets.sum(1) + 1)
    return (positive + negative).mean(1), dice
