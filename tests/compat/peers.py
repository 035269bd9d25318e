"""A peer's model beside that of the authors' package: logits, losses, gradients, statistics."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mcibi_fast.compat import names as own_names
from mcibi_fast.compat import peers, sssegmentation
from mcibi_fast.models import SegmentationHead, Segmentor, head_type
from mcibi_fast.models import released_backbones as backbones
from tests.compat import zoo_models as zoo

TOLERANCE = 1e-10  # relative, in float64
IMAGES = ((64, 80), (57, 75))


class Sizes(NamedTuple):
    """Widths of a model: narrow ones, or those of the published configurations.

    Attributes:
        published: which of the two.
        K: classes.
        Z: channels of the representations.
        base: a quarter of the channels of the first map of ResNet-50.
    """

    published: bool
    K: int
    Z: int
    base: int

    def __call__(self, narrow: Any, published: Any) -> Any:
        """The value of these sizes."""
        return published if self.published else narrow

    @property
    def maps(self) -> list[int]:
        """Channels of ResNet-50's maps."""
        return [4 * self.base * 2**i for i in range(4)]


NARROW = Sizes(False, K=5, Z=16, base=4)
PUBLISHED = Sizes(True, K=21, Z=512, base=64)
K, Z, MAPS = NARROW.K, NARROW.Z, NARROW.maps


class Errors(NamedTuple):
    """The largest errors: of logits and statistics each relative to its largest value, of losses
    relative to the loss, and of gradients relative to the largest of all gradients.
    """

    logits: float
    losses: float
    gradients: float
    statistics: float


def backbone_settings(sizes: Sizes = NARROW, **further: Any) -> dict[str, Any]:
    """A ResNet-50 of stride 8 (``outstride``)."""
    common = {"structure_type": "random", "pretrained": False, "type": "ResNet", "depth": 50}
    widths = {"base_channels": sizes.base, "stem_channels": sizes(8, 64)}
    return common | widths | {"outstride": 8} | further


def settings(
    kind: str,
    head: dict[str, Any],
    *,
    backbone: dict[str, Any] | None = None,
    auxiliary: Any = "one",
    losses: dict[str, float] | None = None,
    sizes: Sizes = NARROW,
    **further: Any,
) -> dict[str, Any]:
    """Settings of a segmentor of the package, without dropout.

    Args:
        kind: the name of its class in the package.
        head: its head's settings, besides ``feats_channels``, ``in_channels`` and ``dropout``.
        backbone: instead of ``backbone_settings()``.
        auxiliary: settings of the auxiliary heads instead of one on the map before the last.
        losses: weights of the losses besides those of the auxiliary heads; by default loss_cls 1.
        sizes: its widths.
        further: other settings.
    """
    if auxiliary == "one":
        auxiliary = {"in_channels": sizes.maps[-2], "out_channels": sizes.Z, "dropout": 0}
    weights = losses or {"loss_cls": 1.0}
    if auxiliary:
        weights = weights | {"loss_aux": 0.4}
    return {
        "type": kind,
        "num_classes": sizes.K,
        "align_corners": False,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": backbone or backbone_settings(sizes),
        "head": {"in_channels": sizes.maps[-1], "feats_channels": sizes.Z, "dropout": 0} | head,
        "auxiliary": auxiliary,
        "losses": {name: zoo.LOSS | {"scale_factor": scale} for name, scale in weights.items()},
    } | further


def compare(
    framework: str,
    released: dict[str, Any],
    ours: dict[str, Any] | None = None,
    *,
    images: tuple[tuple[int, int], ...] = IMAGES,
    renamed_losses: dict[str, str] | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    seed: int = 0,
) -> Errors:
    """Loads the package's random model as ours and compares the two, in evaluation and training.

    Args:
        framework: as which ``load`` must recognise it.
        released: settings of the package's model, see ``settings``.
        ours: arguments of ``load`` for what shapes do not show.
        images: their sizes in evaluation; the last one also in training.
        renamed_losses: the package's names of the losses whose names differ, with ours.
        prepare: is called with the package's model, before its weights are read.
    """
    generator = torch.Generator().manual_seed(seed)
    theirs = zoo.scramble(zoo.build(released).eval(), generator)
    if prepare is not None:
        prepare(theirs)
    theirs = theirs.double()  # of float32 values, as ours is loaded in float32
    state = zoo.checkpoint(theirs)
    assert (peers.framework_of(state["model"]) or "isnet") == framework
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sssegmentation.load(
            state, **({"dropout": 0.0, "ignore_index": -100} | (ours or {}))
        ).double()
    logits = max(_logits_error(theirs, model, size, generator) for size in images)
    names = _names(framework, model)
    batch = _batch(images[-1], released["num_classes"], generator)
    return Errors(logits, *_training_errors(names, theirs, model, batch, renamed_losses or {}))


def check(errors: Errors) -> None:
    """Fails if one of the errors is too large."""
    assert all(error <= TOLERANCE for error in errors), errors


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 0
    return float((value - expected).abs().max() / scale)


def _logits_error(
    theirs: nn.Module, model: Segmentor, size: tuple[int, int], generator: torch.Generator
) -> float:
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    expected = zoo.logits(theirs, images)
    assert expected.std() > 1e-3
    with torch.no_grad():
        return relative_error(model(images).logits, expected)


def _batch(
    size: tuple[int, int], classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    height, width = size
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (2, -(-height // 8), -(-width // 8)), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
    labels[0, :5] = -100
    return images, labels


def _training_errors(
    names: dict[str, str],
    theirs: nn.Module,
    model: Segmentor,
    batch: tuple[Tensor, Tensor],
    renamed_losses: dict[str, str],
) -> tuple[float, float, float]:
    theirs.train()
    model.train()
    images, labels = batch
    with torch.random.fork_rng(devices=[]):
        out = theirs(zoo.inputs(images, labels, "TRAIN"))
    out.loss.backward()
    losses = model(images, labels).losses
    sum(losses.values()).backward()
    expected = dict(out.losses_log_dict)
    expected.pop("loss_total")
    expected = {renamed_losses.get(name, name): value for name, value in expected.items()}
    assert losses.keys() == expected.keys()
    loss_error = max(abs(float(losses[n].detach()) / value - 1) for n, value in expected.items())

    gradients = {names[n]: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    own = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    largest = max(g.abs().max() for g in gradients.values() if g is not None)
    gradient_error = 0.0
    for name, right in gradients.items():
        found = torch.zeros_like(largest) if own[name] is None else own[name]
        right = torch.zeros_like(largest) if right is None else right
        gradient_error = max(gradient_error, float((found - right).abs().max() / largest))

    before = copy.deepcopy(model.state_dict())
    statistics = {names[n]: t for n, t in theirs.named_buffers() if t.is_floating_point()}
    assert statistics
    return (
        loss_error,
        gradient_error,
        max(relative_error(before[name], right) for name, right in statistics.items()),
    )


def _names(framework: str, model: Segmentor) -> dict[str, str]:
    """Our names of the package's entries; a module with two names there has both here."""
    rename = functools.partial(peers.released_name, framework=framework)
    if framework == "isnet":
        shortcut = getattr(model.head, "shortcut", None) is not None
        rename = functools.partial(own_names.released_name, method="isnet", shortcut=shortcut)
    names = {
        rename(backbones.released_name(name, model.backbone)): name for name in model.state_dict()
    }
    for second, first in getattr(peers.PEERS.get(framework), "REPEATED", {}).items():
        for name in [name for name in names if name.startswith(first)]:
            names[second + name.removeprefix(first)] = names[name]
    return names


def load(checkpoint: dict[str, object], **options: Any) -> Segmentor:
    """Ours, loaded from a checkpoint of the package."""
    return sssegmentation.load(checkpoint, **options)


def created(framework: str, loaded: Segmentor) -> SegmentationHead:
    """A fresh head of the same sizes as that of a loaded model."""
    names = _names(framework, loaded)
    state = {released: loaded.state_dict()[own] for released, own in names.items()}
    return peers.build_head(framework, state, loaded.backbone.channels)


def decoder_parameters(framework: str, classes: int, widths: list[int], **options: Any) -> int:
    """Of the head on maps of these channels, without the auxiliary heads."""
    with torch.device("meta"):
        head = head_type(framework)(classes, widths, **options)
    auxiliary = ("auxiliary.", "auxiliaries.")
    decoder = (p for name, p in head.named_parameters() if not name.startswith(auxiliary))
    return sum(p.numel() for p in decoder)
