"""MCIBI++'s memory in the plain segmentors of the authors' package, sssegmentation."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from mcibi_fast.compat.dataset_context import context_of, insert, is_a, last_conv, unknown
from mcibi_fast.nn.class_memory import _process_group

__all__ = ["context_of", "with_mcibi"]


def with_mcibi(model: nn.Module, **options: Any) -> nn.Module:
    """Puts a dataset-level context in front of a segmentor's classifier, in place.

    In training the segmentor's ``loss`` contains that of W, which its log calls ``loss_pr``, and
    each step of the optimiser updates the memory. In evaluation mode the logits are those of the
    last stage. To load a saved state dict, build the segmentor and call ``with_mcibi`` with the
    same options first. The keys differ from those of the package's own MCIBIPlusPlus.

    Args:
        model: a segmentor whose ``decoder`` ends in the classifier (FCN, PSPNet, DeepLabV3,
            UperNet, Segformer, ...), for two classes or more.
        options: of :class:`mcibi_fast.compat.dataset_context.ContextClassifier`; segmentors whose
            features have stride 4 (UperNet, Segformer) should take ``pool=2``. By default
            ``align_corners`` and ``ignore_index`` (of its ``loss_cls``) are those of the segmentor.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is not known or has a context already; a wrong option.
    """
    decoder = getattr(model, "decoder", None)
    if not is_a(model, "BaseSegmentor") or not isinstance(decoder, nn.Sequential):
        raise unknown(model, "sssegmentation", "segmentors with an nn.Sequential named decoder")
    held: Any = model
    classifier = last_conv(model, "decoder")
    of_package = {"align_corners": bool(held.align_corners), "ignore_index": _ignored(held.cfg)}
    filled = of_package | options
    held.mcibi_loss = insert(model, classifier, filled).loss
    model.register_forward_hook(_add_loss, with_kwargs=True)
    return model


def _ignored(config: Any) -> int:
    """The label that the segmentor's main loss ignores."""
    loss = config["losses"]["loss_cls"]
    loss = loss if isinstance(loss, dict) else loss[0]
    return int(loss.get("ignore_index", -100))


def _add_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if output.loss is None:
        return
    data = args[0] if args else kwargs["data_meta"]
    loss = model.mcibi_loss(data.seg_targets)
    output.loss = output.loss + loss
    logged = loss.detach().clone()
    if (group := _process_group()) is not None:  # as the package logs its losses
        dist.all_reduce(logged, group=group)
        logged /= dist.get_world_size(group)
    log = output.losses_log_dict
    log["loss_pr"] = logged.item()
    log["loss_total"] += log["loss_pr"]
