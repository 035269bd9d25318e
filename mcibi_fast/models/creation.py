"""Creates models by name: any framework with any memory or none, for images or for videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcibi_fast.models.backbones import Pretrained, create_backbone, set_drop_path
from mcibi_fast.models.fine_tuning import begin_with, own_checkpoint
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.layout import prepare_convolutions
from mcibi_fast.models.registry import ModelKind, head_type, parse
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.video import VideoSegmentor, load_image_weights
from mcibi_fast.models.weights import find_weights, read_spec
from mcibi_fast.nn.blocks import use_leaky_relu


def create(
    framework: str,
    num_classes: int,
    backbone: str = "resnet50",
    *,
    memory: str | None = None,
    history: int | None = None,
    method: str | None = None,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    drop_path: float | None = None,
    negative_slope: float = 0.0,
    one_logit: bool = False,
    **options: Any,
) -> Segmentor:
    """Creates a model: any framework on any backbone, with any memory or none.

    With past frames it is a video model. The weights of its convolutions are in channels_last
    (:data:`torch.channels_last`), in which they are faster.

    Args:
        framework: "fcn", "pspnet", "upernet", "deeplabv3", "isnet", ... (:func:`frameworks`); or a
            name that includes the memory, such as "upernet_mcibipp" (:func:`names`).
        num_classes: K; 1 gives a model with one logit (`one_logit`).
        backbone: any timm model with ``features_only``.
        memory: "mcibipp" (MCIBI++), "mcibi" (the conference version, Memory-R of Table 3), or None
            for the baseline.
        history: h, the number of past frames from which context is taken (Eq. 19); the default, 0,
            gives an image model.
        method: "etc", "netwarp" or "tcb" (:func:`video_methods`): another method for videos, with
            its usual number of past frames by default.
        output_stride: stride of the backbone's last map.
        pretrained: True loads timm's weights, a path loads that file, and a name such as
            "efficientnet_lite0" the weights in an installed package (:func:`create_backbone`). It
            may also be a checkpoint of this package, a run's directory or a ``.safetensors`` file.
            The model then begins with all weights that fit, of the head and the memory as well:
            see :func:`begin_with`, and for a video model, which begins with the image model of the
            same options, :func:`load_image_weights`.
        drop_path: see :func:`set_drop_path`; None keeps timm's rate.
        negative_slope: if not 0, all of the head's ReLUs are LeakyReLU with this slope. Several
            published checkpoints of MCIBI and ISNet for LIP have 0.01.
        one_logit: for two classes: the logits are (B, 1, h, w), that of class 1 against class 0,
            and its loss is the binary cross entropy (`nn.one_logit`). Labels are 0 and 1.
        options: options of the head: see the framework's class (:class:`FCN`, :class:`PSPNet`, ...)
            and :class:`PlainHead`, :class:`MCIBIPPHead`, :class:`MCIBIHead`, :class:`VideoHead`, or
            of the method (:class:`ETC`, :class:`NetWarp`, :class:`TCB`).

    Raises:
        ValueError: an unknown name, or a backbone that cannot be used (the message says why).
        TypeError: an option that the model does not have.
    """
    kind = parse(framework, memory, history, method)
    head = head_type(kind.framework, kind.memory, video=kind.history > 0, method=kind.method)
    if one_logit or num_classes == 1:
        _check_one_logit(kind, head, num_classes)
        num_classes = 1
    checkpoint = own_checkpoint(pretrained)
    body = create_backbone(
        backbone,
        output_stride=output_stride,
        pretrained=False if checkpoint else pretrained,
    )
    given = _recorded(
        options,
        memory=memory,
        history=history,
        method=method,
        one_logit=one_logit,
        output_stride=output_stride,
        drop_path=drop_path,
        negative_slope=negative_slope,
    )
    if kind.history:
        options["history"] = kind.history
    if head.takes_strides:
        options.setdefault("strides", body.reductions)
    made = head(num_classes, body.channels, **options)
    if negative_slope:
        use_leaky_relu(made, negative_slope)
    model = VideoSegmentor(body, made) if kind.history else Segmentor(body, made)
    if drop_path is not None:
        set_drop_path(model.backbone, drop_path)
    if checkpoint and isinstance(model, VideoSegmentor):
        model.beginning = load_image_weights(model, checkpoint)
    elif checkpoint:
        model.beginning = begin_with(model, checkpoint)
    model.normalisation = normalisation(backbone, pretrained)
    prepare_convolutions(model)
    model._created = framework, backbone, given
    return model


def _check_one_logit(kind: ModelKind, head: type[SegmentationHead], num_classes: int) -> None:
    if num_classes > 2:
        raise ValueError(f"one_logit: tells 2 classes apart, but there are {num_classes}")
    if not head.one_logit:
        raise ValueError(
            f"one_logit: {kind.framework} uses its classes in other ways than to classify pixels, "
            "so it needs a logit for each; give num_classes=2 and leave one_logit out"
        )


def _recorded(options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What was given to `create` besides its defaults, but the loss, which no file holds."""
    usual: Any = create.__kwdefaults__
    given = {name: value for name, value in settings.items() if value != usual[name]}
    return given | {name: value for name, value in options.items() if name != "loss"}


def normalisation(
    backbone: str, pretrained: Pretrained
) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and standard deviation of the images that pretrained weights were trained on.

    Fresh weights have none: None. Weights of timm have those of its ``pretrained_cfg``, and a file
    of such weights, which does not say, those of the backbone's default weights. (timm's
    ``interpolation`` is that of a resize to one size for classification, which is not done here.)

    Args:
        backbone, pretrained: as in :func:`create`.
    """
    if pretrained is False:
        return None
    if checkpoint := own_checkpoint(pretrained):
        spec = read_spec(find_weights(checkpoint))
        return spec.mean, spec.std
    import timm

    try:
        config = timm.get_pretrained_cfg(backbone)
    except RuntimeError:  # no such weights, as creating the model will say
        return None
    return None if config is None else (config.mean, config.std)
