"""All frameworks, and all methods for videos: sources, contexts, parameters, multiply-adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcibi_fast.models.backbones import create_backbone
from mcibi_fast.models.counting import Counts, count
from mcibi_fast.models.flow import Frames
from mcibi_fast.models.outline import outline
from mcibi_fast.models.registry import (
    combines,
    described,
    described_method,
    frameworks,
    head_type,
    parse,
    video_methods,
)

_HEADER = ("name", "title", "source", "context", "M", "G", "memory", "M with it", "G with it")
_METHODS_HEADER = ("name", "title", "source", "takes", "M", "G", "memory")
_UNLIMITED = 10**6  # tensors: no framework has that many


def overview(
    num_classes: int = 21,
    backbone: str = "resnet101",
    *,
    size: int = 512,
    memory: str = "mcibipp",
) -> str:
    """The table as text, one line for each framework.

    M: millions of parameters, with backbone and auxiliary head. G: billions of multiply-adds of the
    convolutions and matrix products in evaluation, of an image of ``size`` x ``size``. Both are
    counted on PyTorch's meta device, which computes nothing.

    Args:
        num_classes: K.
        backbone: any backbone of :func:`create` whose maps all frameworks can take.
        memory: the memory of the last two columns.

    Raises:
        ValueError: an unknown backbone or memory, or no class.
    """
    parse("fcn", memory)
    body, images, features = _backbone(num_classes, backbone, size)
    common = count(body, images)
    lines: list[tuple[str, ...]] = [_HEADER]
    for name in frameworks():
        options = {"strides": body.reductions} if head_type(name).takes_strides else {}
        own, joint = (
            _with(
                common, head_counts(name, num_classes, body.channels, features, memory=m, **options)
            )
            if m is None or combines(name)
            else ("", "")
            for m in (None, memory)
        )
        lines.append((name, *described(name), *own, "yes" if combines(name) else "no", *joint))
    return _aligned(lines)


def video_overview(num_classes: int = 21, backbone: str = "resnet101", *, size: int = 512) -> str:
    """The same of the methods for videos, on PSPNet and OCRNet, one line for each.

    G is that of one frame of a stream; of a flow that a network estimates (RAFT) it has nothing.

    Args:
        num_classes, backbone, size: as for :func:`overview`.

    Raises:
        ValueError: an unknown backbone, or no class.
    """
    body, images, features = _backbone(num_classes, backbone, size)
    common = count(body, images)
    lines: list[tuple[str, ...]] = [_METHODS_HEADER]
    for name in ("pspnet", "ocrnet"):
        for method in video_methods():
            head = head_counts(
                name, num_classes, body.channels, features, method=method, images=images
            )
            title, source, takes = described_method(method)
            memory = "yes" if combines(name, method) else "no"
            words = (f"{name}_{method}", f"{title}+{described(name)[0]}", source, takes)
            lines.append((*words, *_with(common, head), memory))
    return _aligned(lines)


def _backbone(num_classes: int, name: str, size: int) -> tuple[Any, Tensor, list[Tensor]]:
    """A backbone, an image and its maps, on the meta device."""
    for what, value in (("classes", num_classes), ("size", size)):
        if value < 1:
            raise ValueError(f"{what}: expected at least 1, got {value}")
    body = outline(lambda: create_backbone(name, output_stride=8), _UNLIMITED).eval()
    images = torch.zeros(1, 3, size, size, device="meta")
    with torch.no_grad():
        return body, images, body(images)


def head_counts(
    framework: str,
    num_classes: int,
    in_channels: Any,
    features: list[Tensor],
    *,
    memory: str | None = None,
    method: str | None = None,
    images: Tensor | None = None,
    **options: Any,
) -> Counts:
    """What the head of a framework costs, on the meta device; for videos, what a frame costs.

    Args:
        framework, num_classes, memory, method, options: as in :func:`create`.
        in_channels: channels of the backbone's maps, finest first.
        features: the maps, on the meta device.
        images: the images that they are of; a method for videos may need them.
    """
    make = head_type(framework, memory, video=method is not None, method=method)
    head = outline(lambda: make(num_classes, in_channels, **options), _UNLIMITED).eval()
    given: dict[str, Any] = {}
    if head.offsets:
        given["recall"] = lambda left: [left] * len(head.offsets)
        if head.takes_frames and images is not None:
            given["frames"] = Frames(images)
    return count(head, features, **given)


def _with(backbone: Counts, head: Counts) -> tuple[str, str]:
    parameters = backbone.parameters + head.parameters
    return f"{parameters / 1e6:.1f}", f"{(backbone.true + head.true) / 1e9:.1f}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 4  # columns of words are aligned to the left, numbers to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
