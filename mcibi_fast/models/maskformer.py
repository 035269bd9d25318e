"""MaskFormer (arXiv 2107.06278): queries that become masks with classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import extras
from mcibi_fast.models.head import SegmentationHead, refuse_region_losses
from mcibi_fast.models.late import auxiliary_default
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.mask_queries import MaskQueries, mask_costs, mask_losses
from mcibi_fast.nn.within_image import PPM

NO_OBJECT = 0.1  # weight of this class in the losses
WEIGHTS = {"class": 1.0, "mask": 20.0, "dice": 1.0}  # of the losses, and of the costs in matching


class _Target(NamedTuple):
    """The classes (M,) in an image, and the mask of each (M, H, W)."""

    classes: Tensor
    masks: Tensor


@framework(
    "maskformer",
    "MaskFormer",
    source="arXiv 2107.06278",
    context="pyramid pooling, feature pyramid, queries",
    memories=False,
)
class MaskFormer(SegmentationHead):
    """A feature pyramid that embeds the pixels, and queries that become masks and their classes.

    Each query's mask is the product of its embedding and the pixels'. The output is no logits but
    scores: the sum over the queries of the probability of each class times that of the mask, at the
    image's size. There is no map that a memory could classify or join, so that it cannot be
    combined with one.

    In training each class of an image is assigned to one query of each layer, at the least cost,
    which is computed on the CPU. The losses, of every layer: ``loss_ce`` of the class ("no
    object" weighs 0.1), ``loss_mask`` (focal) and ``loss_dice`` of the mask, the last layer's
    without a number. As in the released code, pixels without a label belong to no mask.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        pool_scales: regions per side at each level of the pyramid pooling.
        mask_channels: channels of the embeddings.
        queries: number of queries.
        layers: number of layers of the transformer.
        heads: number of heads of its attentions.
        transform_channels: its width.
        hidden_channels: hidden channels of its feed-forward parts.
        feats_channels: Z, channels of the pyramid.
        dropout: in the transformer.
        auxiliary_weight: weight of the auxiliary head's loss; the released models have none.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`.

    Training needs scipy, from the extra ``train``.
    """

    one_logit = False

    takes_size = True
    class_weights: Tensor
    decoder: Any
    predictor: Any

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        mask_channels: int = 256,
        queries: int = 100,
        layers: int = 6,
        heads: int = 8,
        transform_channels: int = 256,
        hidden_channels: int = 2048,
        feats_channels: int = 512,
        dropout: float = 0.1,
        auxiliary_weight: float | None = None,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        Z = feats_channels
        context = partial(
            PPM, in_channels[-1], Z, pool_scales=pool_scales, align_corners=align_corners
        )
        super().__init__(
            num_classes,
            in_channels,
            decoder=nn.Conv2d(Z, mask_channels, 3, padding=1),
            within_image=context,
            feats_channels=Z,
            dropout=dropout,
            auxiliary_weight=auxiliary_default(self, auxiliary_weight),
            align_corners=align_corners,
            **options,
        )
        refuse_region_losses(self, "MaskFormer")
        self.laterals = nn.ModuleList(conv_bn_relu(c, Z, 1) for c in in_channels[:-1])
        self.outputs = nn.ModuleList(conv_bn_relu(Z, Z, 3) for _ in in_channels[:-1])
        self.predictor = MaskQueries(
            in_channels[-1],
            mask_channels,
            num_classes,
            channels=transform_channels,
            queries=queries,
            heads=heads,
            layers=layers,
            hidden_channels=hidden_channels,
            dropout=dropout,
        )
        # The released checkpoints have it as well.
        self.register_buffer("class_weights", torch.empty(num_classes + 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``."""
        self.class_weights.fill_(1)
        self.class_weights[-1] = NO_OBJECT

    def expand(self, features: Sequence[Tensor], within: Tensor) -> Tensor:
        """The finest map of the pyramid; a convolution follows each of its sums."""
        pairs = list(zip(self.laterals, features[:-1], strict=True))
        for (lateral, finer), output in zip(reversed(pairs), self.outputs, strict=True):
            finer = lateral(finer)
            within = output(resize(within, finer.shape[2:], self.align_corners) + finer)
        return within

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """The pyramid's finest map (B, Z, h, w)."""
        return self.expand(features, self.gather_within_image(features, None, None))

    def forward(  # type: ignore[override]
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        size: Sequence[int] | None = None,
    ) -> SegmentationOutput:
        """Scores (B, K, *size) of images of this size, by default four times the finest map's."""
        pixels = self._run(self.decoder, self._run(self.pixel_representations, features))
        classes, embeddings = self._run(self.predictor, features[-1])
        masks = torch.einsum("lbqc,bchw->lbqhw", embeddings, pixels)
        losses = {}
        if labels is not None:
            losses = self.set_losses(classes, masks, labels)
            if self.auxiliary is not None:
                losses |= self._auxiliary_losses(features, labels)
        size = torch.Size(size or [4 * side for side in pixels.shape[2:]])
        found = resize(masks[-1], size, self.align_corners).sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", classes[-1].softmax(dim=2)[..., :-1], found)
        return SegmentationOutput(scores, losses)

    def set_losses(self, classes: Tensor, masks: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of all layers.

        Args:
            classes: (layers, B, Q, K + 1), logits.
            masks: (layers, B, Q, h, w), logits.
            labels: (B, H, W).
        """
        targets = [self._target(one) for one in labels.long()]
        # Sums over all pixels are not for 16 bits.
        wide = torch.promote_types(masks.dtype, torch.float32)
        classes, masks = classes.to(wide), masks.to(wide)
        count = _mean_over_ranks(sum(len(target.classes) for target in targets), labels.device)
        losses: dict[str, Tensor] = {}
        for layer in range(len(classes)):
            suffix = "" if layer == len(classes) - 1 else f"_{layer}"
            of_layer = self._layer_losses(classes[layer], masks[layer], targets, count)
            losses |= {f"{name}{suffix}": loss for name, loss in of_layer.items()}
        return losses

    def _layer_losses(
        self, classes: Tensor, masks: Tensor, targets: list[_Target], count: Tensor
    ) -> dict[str, Tensor]:
        expected = torch.full(classes.shape[:2], self.num_classes, device=classes.device)
        focal, dice = masks.new_zeros(()), masks.new_zeros(())
        for i, target in enumerate(targets):
            queries, which = assign(classes[i].detach(), masks[i].detach(), target)
            expected[i, queries] = target.classes[which]
            size = target.masks.shape[1:]
            # The released code aligns no corners here, whatever it does elsewhere.
            chosen = resize(masks[i][queries][:, None], size, align_corners=False)
            right = target.masks[which].flatten(1).to(chosen.dtype)
            of_masks = mask_losses(chosen.flatten(1), right)
            focal, dice = focal + of_masks[0].sum(), dice + of_masks[1].sum()
        weights = self.class_weights.to(classes.dtype)
        return {
            "loss_ce": WEIGHTS["class"] * F.cross_entropy(classes.mT, expected, weights),
            "loss_mask": WEIGHTS["mask"] * focal / count,
            "loss_dice": WEIGHTS["dice"] * dice / count,
        }

    def _target(self, labels: Tensor) -> _Target:
        """The classes of one image (H, W); class 0 with an empty mask if no pixel has a label."""
        classes = labels.unique()
        classes = classes[classes != self.ignore_index]
        if not len(classes):
            return _Target(classes.new_zeros(1), labels.new_zeros(1, *labels.shape))
        return _Target(classes, labels == classes[:, None, None])

    def _auxiliary_losses(self, features: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        logits = self._auxiliary_logits(features)
        assert isinstance(logits, Tensor)
        loss = self.loss(
            logits, labels, ignore_index=self.ignore_index, align_corners=self.align_corners
        )
        return {"loss_aux": self.auxiliary_weight * loss}


@torch.no_grad()
def assign(classes: Tensor, masks: Tensor, target: _Target) -> tuple[Tensor, Tensor]:
    """The queries and the indices of the target's classes that are assigned to each other.

    Args:
        classes: (Q, K + 1), logits.
        masks: (Q, h, w), logits; the target's masks are resized to this size, to the nearest pixel.
        target: of the image.
    """
    optimise = extras.load("MaskFormer", "scipy.optimize")
    small = F.interpolate(target.masks[:, None].to(masks.dtype), masks.shape[1:], mode="nearest")
    focal, dice = mask_costs(masks.flatten(1), small[:, 0].flatten(1))
    of_class = -classes.softmax(dim=1)[:, target.classes]
    cost = WEIGHTS["mask"] * focal + WEIGHTS["class"] * of_class + WEIGHTS["dice"] * dice
    pairs = optimise.linear_sum_assignment(cost.double().cpu().numpy())
    queries, which = (torch.as_tensor(side, device=masks.device) for side in pairs)
    return queries, which


def _mean_over_ranks(count: int, device: torch.device) -> Tensor:
    """The mean number of masks per rank, at least 1."""
    total = torch.tensor(float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp(min=1)
