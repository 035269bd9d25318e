"""PointRend (arXiv 1912.08193): SemanticFPN, corrected at the points where it is uncertain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.models.head import refuse_region_losses
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.registry import framework
from mcibi_fast.models.semanticfpn import SemanticFPN
from mcibi_fast.nn.losses import joint_losses
from mcibi_fast.nn.points import RandomPoints, cell_centres, sample_points, uncertainty


class PointHead(nn.Module):
    """Classifies points from a fine map and coarse logits, both sampled there.

    Three times Conv1x1-BN-ReLU, each followed by the coarse logits once more, and a 1x1
    convolution.

    Args:
        in_channels: channels of the fine map, and of the hidden layers.
        num_classes: K.
        layers: number of hidden layers.

    Shape: (B, in_channels, P), (B, K, P) -> logits (B, K, P).
    """

    def __init__(self, in_channels: int, num_classes: int, *, layers: int = 3) -> None:
        super().__init__()
        width = in_channels + num_classes
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, in_channels, 1, bias=False),
                nn.BatchNorm1d(in_channels),
                nn.ReLU(inplace=True),
            )
            for _ in range(layers)
        )
        self.classifier = nn.Conv1d(width, num_classes, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        hidden = torch.cat([fine, coarse], dim=1)
        for layer in self.layers:
            hidden = torch.cat([layer(hidden), coarse], dim=1)
        return self.classifier(hidden)


class _Prepared(NamedTuple):
    """What the coarse logits' classifier has prepared, and the pyramid's finest map."""

    classifier: Tensor
    fine: Tensor


@framework("pointrend", "PointRend", source="arXiv 1912.08193", context="feature pyramid, points")
class PointRend(SemanticFPN):
    """SemanticFPN's logits, which a head on single points corrects where they are uncertain.

    In evaluation the coarse logits are enlarged to twice the size ``subdivisions`` times, and each
    time the most uncertain cells get the point head's logits. It takes the pyramid's finest map
    and the coarse logits at the cells' centres. In training it classifies random points, most of
    them where the coarse logits are uncertain. The losses are ``loss_cls`` (points) and
    ``loss_coarse``.

    With a memory the coarse logits are those of :class:`SemanticFPN` with that memory, through all
    stages; their loss is ``loss_cls``, that of the points ``loss_points``. The point head corrects
    the last stage's logits only: what one call returns, corrected, is not quite the O that the next
    stage is given when one call runs them all.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        pyramid_channels: channels of the pyramid and of the point head.
        coarse_weight: weight of ``loss_coarse``. Only without a memory; 0.4 if None.
        points: number of points per image in training.
        oversampling: the uncertain points are chosen among so many times as many random ones.
        uncertain_share: share of the uncertain points; the others are random.
        subdivisions: how often the size doubles in evaluation.
        subdivision_points: number of cells that are corrected each time. 8196 is the released
            code's.
        seed: of the random points.
        options: further options of :class:`SemanticFPN`.

    In evaluation the logits are ``2 ** subdivisions`` times as large as the finest map.

    Raises:
        TypeError: ``coarse_weight`` with a memory.
    """

    one_logit = False

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        pyramid_channels: int = 256,
        coarse_weight: float | None = None,
        points: int = 2048,
        oversampling: float = 3.0,
        uncertain_share: float = 0.75,
        subdivisions: int = 2,
        subdivision_points: int = 8196,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if coarse_weight is not None and self.has_memory:
            raise TypeError("coarse_weight: only PointRend without a memory has this option")
        if self.has_memory:
            options["seed"] = seed
        super().__init__(num_classes, in_channels, pyramid_channels=pyramid_channels, **options)
        refuse_region_losses(self, "PointRend")
        self.point_head = PointHead(pyramid_channels, num_classes)
        self.random_points = RandomPoints(seed)
        self.coarse_weight = 0.4 if coarse_weight is None else coarse_weight
        self.points, self.oversampling = points, oversampling
        self.uncertain = int(points * uncertain_share)
        self.subdivisions, self.subdivision_points = subdivisions, subdivision_points

    def forward(
        self, features: Sequence[Tensor], labels: Tensor | None = None, **options: Any
    ) -> SegmentationOutput:
        if self.has_memory:
            return super().forward(features, labels, **options)
        total, fine = self._run(self.pyramid, features)
        coarse = self._run(self.decoder, total)
        logits, losses = self.finish(coarse, _Prepared(total, fine), labels)
        if labels is not None:
            weight: Any = self.auxiliary_weight
            others = joint_losses(
                coarse,
                labels,
                auxiliary_logits=self._auxiliary_logits(features),
                auxiliary_weight=weight,
                ignore_index=self.ignore_index,
                align_corners=self.align_corners,
                loss=self.loss,
            )
            coarse_loss = self.coarse_weight * others.pop("loss_cls")
            losses = {"loss_cls": losses["loss_points"], "loss_coarse": coarse_loss, **others}
        return SegmentationOutput(logits, losses)

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """See :meth:`MemoryHead.prepare_classifier`."""
        total, fine = self.pyramid(features)
        return _Prepared(self.prepare_decoded(total), fine)

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """See :meth:`MemoryHead.classify`."""
        return super().classify(augmented, prepared.classifier)

    def finish(
        self, logits: Tensor, prepared: Any, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`MemoryHead.finish`: corrects the logits, and adds the points' loss."""
        losses = {}
        if labels is not None:
            points = self.training_points(logits.detach())
            found = self._run(self._at, prepared.fine, logits, points)
            nearest = sample_points(
                labels[:, None].float(), points, mode="nearest", align_corners=self.align_corners
            )
            point_labels = nearest.long().transpose(1, 2)  # (B, P, 1), as a map
            losses = self.further_losses({"loss_points": found[..., None]}, point_labels)
        return (logits if self.training else self.refined(logits, prepared.fine)), losses

    @torch.no_grad()
    def training_points(self, coarse: Tensor) -> Tensor:
        """Points (B, P, 2): the most uncertain of many random ones, and random ones."""
        batch, device = len(coarse), coarse.device
        among = self.random_points(batch, int(self.points * self.oversampling), device)
        sampled = sample_points(coarse, among, align_corners=self.align_corners)
        chosen = uncertainty(sampled).topk(self.uncertain, dim=1).indices
        chosen_points = among.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        others = self.random_points(batch, self.points - self.uncertain, device)
        return torch.cat([chosen_points, others], dim=1)

    def refined(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The coarse logits, enlarged and corrected where they are uncertain."""
        logits = coarse
        for _ in range(self.subdivisions):
            logits = F.interpolate(
                logits, scale_factor=2.0, mode="bilinear", align_corners=self.align_corners
            )
            size = logits.shape[2:]
            count = min(self.subdivision_points, size.numel())
            cells = uncertainty(logits).flatten(1).topk(count, dim=1).indices
            corrected = self._at(fine, coarse, cell_centres(cells, size))
            where = cells[:, None].expand(-1, logits.shape[1], -1)
            corrected = corrected.to(logits.dtype)
            logits = logits.flatten(2).scatter(2, where, corrected).unflatten(2, size)
        return logits

    def _at(self, fine: Tensor, coarse: Tensor, points: Tensor) -> Tensor:
        """The point head's logits (B, K, P)."""
        maps = (sample_points(m, points, align_corners=self.align_corners) for m in (fine, coarse))
        return self.point_head(*maps)
