"""Training losses (section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.nn.one_logit import two_logits
from mcibi_fast.nn.region_losses import region_losses
from mcibi_fast.nn.transient import TransientTensors, transient_tensors


class PixelLoss(TransientTensors):
    """Cross entropy of the upsampled logits, with class weights, smoothing and hard examples.

    Without options it is ``ops.upsample_cross_entropy``. Logits of the labels' size (K x H x W) are
    never formed.

    Args:
        class_weights: w_c, one per class. The mean is then weighted over the valid pixels:
            sum_i w(y_i) l_i / sum_i w(y_i); it is 0 if all valid pixels have weight 0.
        label_smoothing: s, the share of the target that is spread over all classes.
        ohem_threshold: online hard example mining: only pixels whose right class has a probability
            below this threshold count, and the loss is the mean over these pixels (divided by their
            number, even with class weights).
        ohem_min_kept: keep at least this many pixels per call, the hardest ones (all if fewer are
            valid; more if several have the same probability).
        cross_entropy: weight of the prediction's cross entropy, ``loss_cls``.
        dice, lovasz, focal: weights of further losses of the prediction (`joint_losses`); 0 leaves
            one out. See :func:`mcibi_fast.nn.region_losses.region_losses`: unlike the cross entropy
            they form the upsampled logits.
        focal_gamma: gamma of the focal loss.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        *,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100_000,
        cross_entropy: float = 1.0,
        dice: float = 0.0,
        lovasz: float = 0.0,
        focal: float = 0.0,
        focal_gamma: float = 2.0,
    ) -> None:
        super().__init__()
        weights = None
        if class_weights is not None:
            weights = torch.tensor(class_weights, dtype=torch.float64, device="cpu")
            if not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ValueError(
                    "class_weights: expected finite numbers of at least 0, "
                    f"got {list(class_weights)}"
                )
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: expected at least 0 and less than 1, got {label_smoothing}"
            )
        if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
            raise ValueError(
                f"ohem_threshold: expected a probability above 0, up to 1, got {ohem_threshold}"
            )
        if ohem_min_kept < 1:
            raise ValueError(f"ohem_min_kept: expected at least 1, got {ohem_min_kept}")
        self.cross_entropy, self.focal_gamma = cross_entropy, focal_gamma
        self.regions = {"dice": dice, "lovasz": lovasz, "focal": focal}
        for name, weight in (self.regions | {"cross_entropy": cross_entropy}).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: expected a weight of 0 or more, got {weight}")
        if not 0 <= focal_gamma < math.inf:
            raise ValueError(f"focal_gamma: expected 0 or more, got {focal_gamma}")
        self._hold("class_weights", weights)
        self._dtype = torch.float32
        self._some_weigh_nothing = weights is not None and bool((weights == 0).any())
        self.label_smoothing = label_smoothing
        self.ohem_threshold, self.ohem_min_kept = ohem_threshold, ohem_min_kept

    @property
    def has_regions(self) -> bool:
        """Whether there are losses besides the cross entropy."""
        return any(self.regions.values()) or self.cross_entropy != 1

    def of_prediction(
        self,
        cross_entropy: Tensor,
        logits: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> dict[str, Tensor]:
        """All weighted losses of the prediction O, by their names.

        Args:
            cross_entropy: the cross entropy of ``logits``.
            logits, labels, ignore_index, align_corners: as in `forward`.
        """
        return {"loss_cls": self.cross_entropy * cross_entropy} | region_losses(
            logits,
            labels,
            self.regions,
            focal_gamma=self.focal_gamma,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )

    @property
    def class_weights(self) -> Tensor | None:
        """w_c (K,), on the device where they were used last; None without weights."""
        weights = transient_tensors(self).get("class_weights")
        return None if weights is None else weights.to(self._dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PixelLoss:
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(1, dtype=self._dtype, device="cpu")).dtype
        return self

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> Tensor:
        """The loss, a scalar; arguments and errors as in ``ops.upsample_cross_entropy``.

        One logit (B, 1, h, w) is that of class 1 against class 0: binary cross entropy, with labels
        0 and 1 (`mcibi_fast.nn.one_logit`).
        """
        logits = two_logits(logits)
        if self._some_weigh_nothing:
            # All valid pixels of a crop or micro-batch may have weight 0. Ignored, they give 0, not
            # 0 / 0.
            nothing = self.total_weight(labels, ignore_index=ignore_index) == 0
            labels = labels.long().masked_fill(nothing, ignore_index)
        losses = ops.upsample_cross_entropy(
            logits,
            labels,
            weight=self._held("class_weights", logits.device),
            label_smoothing=self.label_smoothing,
            ignore_index=ignore_index,
            align_corners=align_corners,
            reduction="mean" if self.ohem_threshold is None else "none",
        )
        if self.ohem_threshold is None:
            return losses
        plain = losses
        if self.class_weights is not None or self.label_smoothing:
            plain = ops.upsample_cross_entropy(
                logits.detach(),
                labels,
                ignore_index=ignore_index,
                align_corners=align_corners,
                reduction="none",
            )
        kept = self._hard(plain.detach(), labels.long() != ignore_index, self.ohem_threshold)
        return losses.where(kept, 0).sum() / kept.sum().clamp(min=1)

    def _hard(self, losses: Tensor, valid: Tensor, threshold: float) -> Tensor:
        """Which pixels count (B, H, W), given their plain cross entropies -log p."""
        # Ignored pixels sort last, so all valid ones are kept if there are fewer than min_kept.
        probability = (-losses).exp().where(valid, torch.inf)
        last = min(self.ohem_min_kept, probability.numel()) - 1
        hardest = probability.flatten().sort().values[last]
        return valid & ((probability < threshold) | (probability <= hardest))

    def total_weight(self, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """What the mean over ``labels`` divides by: valid pixels, or the sum of their weights."""
        labels = labels.long()  # their own dtype may be too small for ignore_index
        valid = labels != ignore_index
        if self.class_weights is None or self.ohem_threshold is not None:
            return valid.sum().float()
        weights = self._held("class_weights", labels.device)
        return weights[labels.where(valid, 0).clamp(0, len(weights) - 1)].where(valid, 0).sum()


def joint_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    weight_logits: Tensor | None = None,
    context_logits: Tensor | None = None,
    auxiliary_logits: Tensor | Sequence[Tensor] | None = None,
    alpha: float = 0.4,
    auxiliary_weight: float = 0.4,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
    loss: Callable[..., Tensor] = ops.upsample_cross_entropy,
) -> dict[str, Tensor]:
    """The weighted terms whose sum is the training loss.

    L = alpha L_W + L_O (Eq. 16), and one term for each further head whose logits are given. Dice,
    Lovász and focal losses of a :class:`PixelLoss` are added for the prediction O alone: W and the
    further heads keep the cross entropy, which trains W as the distribution that Eq. 10 takes it
    for.

    Args:
        logits: the prediction O of H_cls; gives ``loss_cls`` with weight 1 (L_O).
        labels: (B, H, W).
        weight_logits: the logits of W from H_pr; give ``loss_pr`` with weight ``alpha`` (L_W).
        context_logits: logits of the head on the within-image context; give ``loss_cwi`` with
            weight 1.
        auxiliary_logits: logits of the head on an earlier stage of the backbone; give ``loss_aux``
            with weight ``auxiliary_weight``. Those of several heads give ``loss_aux1``,
            ``loss_aux2``, ..., each with that weight.
        ignore_index, align_corners: see ``ops.upsample_cross_entropy``.
        loss: computes each term, for example a :class:`PixelLoss`.
    """
    terms: dict[str, tuple[float, Tensor | None]] = {
        "loss_cls": (1.0, logits),
        "loss_pr": (alpha, weight_logits),
        "loss_cwi": (1.0, context_logits),
    }
    if auxiliary_logits is None or isinstance(auxiliary_logits, Tensor):
        terms["loss_aux"] = (auxiliary_weight, auxiliary_logits)
    else:
        for i, one in enumerate(auxiliary_logits, 1):
            terms[f"loss_aux{i}"] = (auxiliary_weight, one)
    options: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
    losses = {
        name: weight * loss(term, labels, **options)
        for name, (weight, term) in terms.items()
        if term is not None
    }
    if isinstance(loss, PixelLoss) and loss.has_regions:
        losses |= loss.of_prediction(losses["loss_cls"], logits, labels, **options)
    return losses
