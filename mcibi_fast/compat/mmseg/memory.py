"""MCIBI++'s memory in decode heads of mmsegmentation (onedl-mmsegmentation)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mcibi_fast.compat.dataset_context import ContextClassifier, insert, is_a, unknown
from mcibi_fast.nn.swapping import original


def with_mcibi(model: nn.Module, **options: Any) -> nn.Module:
    """Puts a dataset-level context in front of a decode head's classifier, in place.

    The head's losses have one more, ``loss_pr`` (``decode.loss_pr`` in a segmentor's), and each
    step of the optimiser updates the memory, also with the library's runner and its gradient
    accumulation. In evaluation mode the logits are those of the last stage. To load a checkpoint of
    the result, build the model and call ``with_mcibi`` with the same options first.

    Args:
        model: an ``EncoderDecoder`` with one decode head, or a decode head itself, whose logits are
            those of ``cls_seg``, for two classes or more.
        options: of :class:`mcibi_fast.compat.dataset_context.ContextClassifier`; heads whose
            features have stride 4 (UPerHead, SegformerHead) should take ``pool=2``.
            ``ignore_index`` and ``align_corners`` are those of the head by default.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is not known or has a context already; a wrong option.
    """
    head: Any = getattr(model, "decode_head", model)
    if not isinstance(head, nn.Module) or not is_a(head, "BaseDecodeHead") or _own_losses(head):
        raise unknown(model, "mmseg", "decode heads with the losses of BaseDecodeHead")
    filled = {"ignore_index": head.ignore_index, "align_corners": head.align_corners} | options
    dropout = None if head.dropout is None else "dropout"
    placed = insert(head, "conv_seg", filled, dropout=dropout)
    held = head.loss_decode
    losses = list(held) if isinstance(held, nn.ModuleList) else [held]
    head.loss_decode = nn.ModuleList([*losses, _WeightLoss(placed)])
    return model


def _own_losses(head: Any) -> bool:
    """Whether the head computes its losses or logits in another way than the base class."""
    own = original(head)  # it may be accelerated
    base = next(cls for cls in own.__mro__ if cls.__name__ == "BaseDecodeHead")
    return any(
        getattr(own, name) is not getattr(base, name)
        for name in ("loss", "loss_by_feat", "cls_seg")
    ) and not is_a(head, "EncHead")  # it adds one


class _WeightLoss(nn.Module):
    """One of the head's losses: that of W, in the last forward of a classifier elsewhere."""

    loss_name = "loss_pr"
    reads_logits = False  # of the classifier, so `accelerate` need not form them for it

    def __init__(self, classifier: ContextClassifier) -> None:
        super().__init__()
        self._classifier = (classifier,)  # a tuple, as it is not a part of this module

    def forward(self, _seg_logits: Tensor, labels: Tensor, **_options: Any) -> Tensor:
        """labels: (B, H, W)."""
        return self._classifier[0].loss(labels)
