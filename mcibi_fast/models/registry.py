"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcibi_fast.models.backbones import set_drop_path
from mcibi_fast.models.deeplabv3 import deeplabv3, deeplabv3_mcibi, deeplabv3_mcibipp
from mcibi_fast.models.fcn import fcn, fcn_mcibi, fcn_mcibipp
from mcibi_fast.models.isnet import isnet, isnet_mcibi, isnet_mcibipp
from mcibi_fast.models.pspnet import pspnet, pspnet_mcibi, pspnet_mcibipp
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.upernet import upernet, upernet_mcibi, upernet_mcibipp
from mcibi_fast.models.video import (
    fcn_video_mcibi,
    fcn_video_mcibipp,
    upernet_video_mcibi,
    upernet_video_mcibipp,
)

_MODELS: dict[str, Callable[..., Segmentor]] = {
    "deeplabv3": deeplabv3,
    "deeplabv3_mcibi": deeplabv3_mcibi,
    "deeplabv3_mcibipp": deeplabv3_mcibipp,
    "fcn": fcn,
    "fcn_mcibi": fcn_mcibi,
    "fcn_mcibipp": fcn_mcibipp,
    "fcn_video_mcibi": fcn_video_mcibi,
    "fcn_video_mcibipp": fcn_video_mcibipp,
    "isnet": isnet,
    "isnet_mcibi": isnet_mcibi,
    "isnet_mcibipp": isnet_mcibipp,
    "pspnet": pspnet,
    "pspnet_mcibi": pspnet_mcibi,
    "pspnet_mcibipp": pspnet_mcibipp,
    "upernet": upernet,
    "upernet_mcibi": upernet_mcibi,
    "upernet_mcibipp": upernet_mcibipp,
    "upernet_video_mcibi": upernet_video_mcibi,
    "upernet_video_mcibipp": upernet_video_mcibipp,
}


def names() -> list[str]:
    """What :func:`create` knows."""
    return sorted(_MODELS)


def create(
    name: str,
    num_classes: int,
    backbone: str = "resnet50",
    *,
    drop_path: float | None = None,
    **options: Any,
) -> Segmentor:
    """A model by name.

    Args:
        name: a framework, "fcn", "pspnet", "upernet", "deeplabv3" or "isnet", or with MCIBI++ or
            MCIBI, "fcn_mcibipp", "fcn_mcibi" and so on; of videos, "upernet_video_mcibipp", ...;
            all in :func:`names`.
        num_classes: K.
        backbone: any timm model with ``features_only``.
        drop_path: see :func:`set_drop_path`; None leaves timm's rate.
        options: of the model's own function, for example ``output_stride``, ``pretrained``,
            ``feats_channels``, ``form``.

    Raises:
        ValueError: an unknown name, or a backbone that cannot be used (the message says why).
        TypeError: an option that the model does not have.
    """
    if name not in _MODELS:
        raise ValueError(f"name: no model {name!r}; there are {', '.join(names())}")
    model = _MODELS[name](num_classes, backbone, **options)
    if drop_path is not None:
        set_drop_path(model.backbone, drop_path)
    return model
