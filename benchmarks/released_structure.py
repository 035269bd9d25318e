"""MCIBI++ with the structure of the authors' released code, in plain PyTorch, for comparison.

The released code (sssegmentation) samples class by class in a Python loop, forms the attention's
N x N matrix, upsamples the features to the size of the labels and masks every class there to update
the memory, upsamples the logits for each loss and for the argmax, and runs the whole network for
each stage of iterative inference. The same is done here with the parameters of our own modules, so
that the results can be compared. Two things differ: each class has its own generator for the noise
(the released code reseeds the global one), and the memory is a buffer.

It supports FCN + MCIBI++ with ``noise="released"``, the only noise that a loop of generators can
draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.models import MCIBIPPHead, SegmentationOutput, Segmentor
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory, PositionConfidenceAttention
from mcibi_fast.nn.context import Concatenation


def sample(memory: GaussianMemory, like: Tensor) -> Tensor:
    """C_dl (K, Z) by Algorithm 1 (Eq. 11): waits twice per class for the device; one transfer."""
    if memory.noise != "released":
        raise ValueError(f"noise: expected a memory with noise='released', got {memory.noise!r}")
    rows = []
    for k in range(memory.num_classes):
        mean, deviation = float(memory.memory[k, 0]), float(memory.memory[k, 1])
        eps = torch.randn(memory.channels, generator=torch.Generator().manual_seed(k))
        rows.append(mean + deviation * eps)
    return torch.stack(rows).to(like.device, like.dtype)


def gather(weight_logits: Tensor, C_dl: Tensor, hard: bool) -> Tensor:
    """C~_bi = W C_dl (Eq. 12): (B, K, h, w) and (K, Z) -> (B, Z, h, w)."""
    rows = weight_logits.flatten(2).transpose(1, 2)  # (B, N, K)
    W = F.one_hot(rows.argmax(2), rows.shape[2]).to(rows.dtype) if hard else rows.softmax(2)
    return (W @ C_dl).transpose(1, 2).unflatten(2, weight_logits.shape[2:]).contiguous()


def attend(attention: PositionConfidenceAttention, queries: Tensor, keys: Tensor) -> Tensor:
    """Eq. 13 with the scores and their softmax in memory, each (B, N, N)."""
    query = attention.query(queries).flatten(2).transpose(1, 2).contiguous()
    key = attention.key(keys).flatten(2)
    value = attention.value(keys).flatten(2).transpose(1, 2).contiguous()
    weights = torch.softmax(attention.scale * torch.matmul(query, key), dim=-1)
    context = torch.matmul(weights, value).transpose(1, 2).contiguous()
    return attention.output(context.unflatten(2, queries.shape[2:]))


def aggregate(context: DatasetLevelContext, R: Tensor, weight_logits: Tensor) -> Tensor:
    """C_bi (Eqs. 11-13)."""
    coarse = gather(weight_logits, sample(context.memory, R), context.hard)
    if context.downsample is None:
        return attend(context.attention, R, coarse)
    C_bi = attend(context.attention, context.downsample(R), context.downsample(coarse))
    return resize(C_bi, R.shape[2:], context.align_corners)


def augment(context: DatasetLevelContext, R: Tensor, weight_logits: Tensor) -> Tensor:
    """R_aug = F_T(R, C_bi) (Eq. 4)."""
    C_bi = aggregate(context, R, weight_logits)
    if isinstance(context.fuse, Concatenation):
        return context.fuse.conv(torch.cat([R, C_bi], dim=1))
    return context.fuse(R, C_bi)


@torch.no_grad()
def update(memory: GaussianMemory, R: Tensor, labels: Tensor) -> None:
    """Eqs. 6-9 on upsampled features, one mask per class: waits 6n + 1 times for n classes."""
    pixels = resize(R, labels.shape[1:], memory.align_corners).permute(0, 2, 3, 1).contiguous()
    pixels, flat = pixels.view(-1, memory.channels), labels.reshape(-1)
    state, m = memory.memory, memory.momentum
    for k in flat.unique():
        if k == memory.ignore_index:
            continue
        mean_pixel = pixels[flat == k].mean(0)
        mean, deviation = mean_pixel.mean(), mean_pixel.std(unbiased=memory.unbiased)
        state[k, 0] = (1 - m) * state[k, 0] + m * mean
        state[k, 1] = (1 - m) * state[k, 1] + m * deviation


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int, align_corners: bool) -> Tensor:
    """Eqs. 14 and 15 on logits of the labels' size, (B, K, H, W)."""
    upsampled = resize(logits, labels.shape[1:], align_corners)
    return F.cross_entropy(upsampled, labels, ignore_index=ignore)


def resize(maps: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=align_corners)


class ReleasedHead(nn.Module):
    """``MCIBIPPHead`` without a within-image context, on the same parameters and memory."""

    def __init__(self, head: MCIBIPPHead) -> None:
        super().__init__()
        if head.within_image is not None:
            raise ValueError("head: a within-image context is not part of this comparison")
        self.head = head

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        previous_logits: Tensor | None = None,
    ) -> SegmentationOutput:
        """One pass; labels add the losses and, in training mode, the update of the memory."""
        head, context = self.head, self.head.context
        R = head.bottleneck(features[-1])
        weight_logits = context.weight_head(R)
        weights = weight_logits
        if previous_logits is not None:
            weights = self.mix(weight_logits, previous_logits)
        logits = head.decoder(augment(context, R, weights))
        losses = {}
        if labels is not None:
            terms = {"loss_cls": (1.0, logits), "loss_pr": (head.alpha, weight_logits)}
            if head.auxiliary is not None:
                terms["loss_aux"] = (head.auxiliary_weight, head.auxiliary(features[-2]))
            losses = {
                name: weight * cross_entropy(term, labels, head.ignore_index, head.align_corners)
                for name, (weight, term) in terms.items()
            }
            if self.training:
                update(head.memory, R, labels)
        return SegmentationOutput(logits, losses, weight_logits)

    def mix(self, weight_logits: Tensor, logits: Tensor) -> Tensor:
        """The weights of the next stage (Eq. 17, or the released mixing of logits)."""
        if self.head.mixing == "paper":
            return ((logits.softmax(1) + weight_logits.softmax(1)) / 2).log()
        a, b = self.head.stage_weights
        return (a * weight_logits + b * logits) / (a + b - 1)


class ReleasedModel(nn.Module):
    """``Segmentor`` with a :class:`ReleasedHead` on the same parameters."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = ReleasedHead(model.head)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> SegmentationOutput:
        return self.head(self.backbone(images), labels)

    def predict(self, images: Tensor, stages: int = 1) -> tuple[Tensor, Tensor]:
        """The last stage's logits, and the classes (B, H, W) from its upsampled logits.

        Every stage runs the whole network again, as the released code does.
        """
        logits = None
        for _ in range(stages):
            logits = self.head(self.backbone(images), previous_logits=logits).logits
        assert logits is not None, "stages: expected at least 1"
        full = resize(logits, images.shape[2:], self.head.head.align_corners)
        return logits, full.argmax(1)
