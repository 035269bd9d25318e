"""Loads checkpoints of the authors' released code (sssegmentation) as models of this package.

A checkpoint is ``{"model": state_dict}`` of MCIBI++, MCIBI or ISNet, or of a method that the paper
compares with (:mod:`mcibi_fast.compat.peers`). Everything that its keys and
shapes show is inferred: the method, the backbone's depth and widths, channels, classes, the kind of
context. What they do not show is known of the published checkpoints
(:mod:`mcibi_fast.compat.zoo`); of others it is assumed, and said in a warning, unless it is given.
The backbones are those of :mod:`mcibi_fast.models.released_backbones`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from mcibi_fast.compat import names, peers, shapes, zoo
from mcibi_fast.compat.heads import build_head
from mcibi_fast.compat.shapes import StateDict
from mcibi_fast.compat.sssegmentation.source import Checkpoint, read
from mcibi_fast.limits import check_limit
from mcibi_fast.models import SegmentationHead
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.backbone_wrappers import Backbone
from mcibi_fast.models.layout import prepare_convolutions
from mcibi_fast.models.memory_head import WeightsFrom
from mcibi_fast.models.outline import Unbuildable, outline
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.terminal import warn

_Module = TypeVar("_Module", bound=nn.Module)


def load(
    checkpoint: Checkpoint,
    *,
    output_stride: int | None = None,
    dataset: str | None = None,
    ema: bool | None = None,
    weights_from: WeightsFrom = "auto",
    dilations: Sequence[int] | None = None,
    stem_relu: bool | None = None,
    negative_slope: float | None = None,
    **options: Any,
) -> Segmentor:
    """Loads a released checkpoint as a model in evaluation mode.

    What the file does not show is that of the published checkpoint which it is: by the name of the
    file or of its folder, or by the dataset and the shapes. A warning says so if only the shapes
    tell it, or if its widths are others. If it is none of them, a warning says what is assumed.
    Arguments that are given always count. The model's attribute ``tested_with`` says how the
    authors tested a published checkpoint.

    Args:
        checkpoint: a file, or what ``torch.load`` returns for it: ``{"model": state_dict}``. The
            trainer's link to its latest checkpoint works wherever its folder is.
        output_stride: output stride of the backbone. None means that of the published ResNets: 8,
            and 32 for SemanticFPN and PointRend.
        dataset: the dataset that it was trained on, such as "ade20k", if that is known.
        ema: load ``model_ema``, the averaged weights that some trainings keep, instead of
            ``model``. None means no, with a warning if there are such weights.
        weights_from, dilations, negative_slope, options: see :func:`head`.
        stem_relu: whether a ReLU follows the first batch norm of an HRNet. Of the published ones
            those for Cityscapes have none. For others it is assumed that there is one, unless they
            have 19 classes as Cityscapes has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint, or keys are missing, unknown or of another shape
            (the message names them).
    """
    loaded = load_published(
        checkpoint,
        output_stride=output_stride,
        dataset=dataset,
        ema=ema,
        weights_from=weights_from,
        dilations=dilations,
        stem_relu=stem_relu,
        negative_slope=negative_slope,
        **options,
    )
    for note in loaded.notes:
        warn(note)
    return loaded.model


class Loaded(NamedTuple):
    """A loaded model, the published checkpoint that it is (if any), and what to say about it."""

    model: Segmentor
    published: zoo.Published | None
    notes: list[str]


def load_published(
    checkpoint: Checkpoint,
    *,
    output_stride: int | None = None,
    dataset: str | None = None,
    ema: bool | None = None,
    weights_from: WeightsFrom = "auto",
    dilations: Sequence[int] | None = None,
    stem_relu: bool | None = None,
    negative_slope: float | None = None,
    **options: Any,
) -> Loaded:
    """As :func:`load`, which warns about the ``notes``."""
    source = read(checkpoint, ema)
    state = source.state
    if peer := peers.framework_of(state):
        own = {"dilations": dilations, "negative_slope": negative_slope, **options}
        stride = output_stride or peers.output_stride(peer)
        model = _peer(peer, state, stride, stem_relu is not False, own)
        return Loaded(model, None, [f"{source.title}: {note}" for note in source.notes])
    settings = _settings(
        state,
        source.names,
        dataset,
        weights_from=weights_from,
        dilations=dilations,
        stem_relu=stem_relu,
        negative_slope=negative_slope,
    )

    def build() -> Segmentor:
        backbone = _build_backbone(state, output_stride or shapes.OUTPUT_STRIDE, settings.stem_relu)
        return Segmentor(backbone, build_head(state, **_head_options(settings, options)))

    def rename(name: str, model: Segmentor) -> str:
        name = backbones.released_name(name, model.backbone)
        return settings.released_name(name)

    model = _filled(build, state, rename)
    if settings.published is not None:
        model.tested_with = dict(settings.published.inference)
    notes = [f"{source.title}: {note}" for note in (*source.notes, *settings.notes)]
    return Loaded(model, settings.published, notes)


def head(
    state_dict: StateDict,
    *,
    dataset: str | None = None,
    weights_from: WeightsFrom = "auto",
    hard: bool = False,
    dilations: Sequence[int] | None = None,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    stem_relu: bool | None = None,
    negative_slope: float | None = None,
    dropout: float = 0.1,
    align_corners: bool = False,
    **options: Any,
) -> SegmentationHead:
    """Loads only the head of a released checkpoint, in evaluation mode.

    It is called with the backbone's maps: ``forward([f0, f1, f2, f3])``. Those of MCIBI's ViT must
    be normalised (``norm_layers``), those of its HRNet for Cityscapes and LIP halved
    (``downsample_backbone``).

    Args:
        state_dict: the checkpoint's entries; those of the backbone are ignored.
        dataset: see :func:`load`.
        weights_from: of MCIBI++: whose logits are used as W. "auto" takes the within-image head's
            if there is one; of the published checkpoints only ppm_resnet50os8_ade20k needs "pr",
            which "auto" then takes.
        hard: gather with one-hot weights.
        dilations: dilations of the ASPP branches: (1, 12, 24, 36), but (1, 6, 12, 18) in MCIBI's
            ViT-L for ADE20K.
        pool_scales: scales of the PPM branches.
        stem_relu: see :func:`load`; a head has no stem, so that it makes no difference here.
        negative_slope: slope of the head's LeakyReLUs. 0, which means ReLU, but 0.01 in MCIBI's
            ResNet-50 and ResNet-101 and in all of ISNet for LIP.
        dropout: channel dropout if the model is trained further.
        align_corners: whether every resizing aligns corners.
        options: further options of the head, for example ``ignore_index`` (255 here, -100 in the
            released code), ``momentum`` and ``stages``.

    Raises:
        ValueError: as in :func:`load`.
    """
    settings = _settings(
        state_dict,
        (),
        dataset,
        weights_from=weights_from,
        dilations=dilations,
        stem_relu=stem_relu,
        negative_slope=negative_slope,
    )
    between = ("backbone_net.", "norm_layers.", "downsample_backbone.")
    state = {k: v for k, v in state_dict.items() if not k.startswith(between)}
    given = options | {
        "hard": hard,
        "pool_scales": pool_scales,
        "dropout": dropout,
        "align_corners": align_corners,
    }

    def build() -> SegmentationHead:
        return build_head(state, **_head_options(settings, given))

    loaded = _filled(build, state, lambda name, _: settings.released_name(name))
    for note in settings.notes:
        warn(f"checkpoint: {note}")
    return loaded


@dataclass(frozen=True)
class _Settings:
    """What the file does not show, and what to say about it.

    ``published``: the published checkpoint that it is, if any.
    """

    layout: zoo.Layout
    published: zoo.Published | None
    weights_from: str
    dilations: Sequence[int]
    stem_relu: bool
    negative_slope: float
    notes: list[str]

    def released_name(self, name: str) -> str:
        return names.released_name(name, self.layout.method, shortcut=self.layout.shortcut)


def _peer(
    framework: str, state: StateDict, output_stride: int, stem_relu: bool, options: dict[str, Any]
) -> Segmentor:
    options = {name: value for name, value in options.items() if value is not None}
    state = peers.entries(framework, state)

    def build() -> Segmentor:
        backbone = _build_backbone(state, output_stride, stem_relu)
        return Segmentor(backbone, peers.build_head(framework, state, backbone.channels, **options))

    def rename(name: str, model: Segmentor) -> str:
        return peers.released_name(backbones.released_name(name, model.backbone), framework)

    return _filled(build, state, rename)


def _settings(
    state: StateDict, known_as: tuple[str, ...], dataset: str | None, **given: Any
) -> _Settings:
    check_limit("MAX_TENSORS", len(state), f"checkpoint: it holds {len(state):,} entries")
    layout = shapes.layout_of(state)
    published, how = zoo.identify(layout, names=known_as, dataset=dataset)
    if published is not None:
        hidden = published.hidden
    else:
        cityscapes = layout.classes == zoo.CLASSES["cityscapes"] and dataset is None
        hidden = zoo.Hidden(stem_relu=not (cityscapes or dataset == "cityscapes"))
    asked = {name: value for name, value in given.items() if value not in (None, "auto")}
    taken = {name: getattr(hidden, name) for name in given} | asked
    if taken["weights_from"] == "auto" and layout.context != "none":
        taken["weights_from"] = "cwi" if layout.method == "mcibiplusplus" else "auto"
    open_ones = [name for name in _matters(layout, state) if name not in asked]
    shown = ", ".join(f"{name}={taken[name]!r}" for name in open_ones)
    notes = []
    if published is None and open_ones:
        notes.append(
            "not a published checkpoint by its name or its shapes; its entries do not show "
            f"everything, and this is assumed: {shown}; pass what differs"
        )
    elif published is not None and how in (zoo.BY_SHAPES, zoo.BY_STRUCTURE):
        notes.append(f"taken for {published.name} {how}, hence {shown}; pass what differs")
    return _Settings(layout, published, notes=notes, **taken)


def _matters(layout: zoo.Layout, state: StateDict) -> list[str]:
    """The settings that make a difference for such a checkpoint."""
    matters = ["negative_slope"]
    if layout.context == "aspp":
        matters.insert(0, "dilations")
    if layout.method == "mcibiplusplus" and layout.context != "none":
        matters.insert(0, "weights_from")
    if "backbone_net.stage2.0.branches.0.0.conv1.weight" in state:
        matters.append("stem_relu")
    return matters


def _head_options(settings: _Settings, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hard": False,
        "pool_scales": (1, 2, 3, 6),
        "weights_from": settings.weights_from,
        "dilations": settings.dilations,
        "negative_slope": settings.negative_slope,
        **options,
    }


def _build_backbone(state: StateDict, output_stride: int, stem_relu: bool) -> Backbone:
    backbone = backbones.build(state, output_stride, stem_relu=stem_relu)
    if backbone is None:
        raise ValueError(
            "checkpoint: its entries backbone_net.* belong to none of ResNet (v1c), ResNeSt, "
            "HRNet, Swin and ViT"
        )
    return backbone


def _filled(
    build: Callable[[], _Module], state: StateDict, rename: Callable[[str, _Module], str]
) -> _Module:
    """The model that ``build`` creates, in evaluation mode, with every entry loaded.

    It is first built without memory, so that refusing shapes larger than the file costs nothing.
    """
    try:
        _entries(outline(build, len(state)), state, rename)
    except Unbuildable as error:
        raise ValueError(f"checkpoint: {error}") from error
    model = build()
    model.load_state_dict(_entries(model, state, rename), strict=True)
    prepare_convolutions(model)
    return model.eval()


def _entries(
    model: _Module, state: StateDict, rename: Callable[[str, _Module], str]
) -> dict[str, Tensor]:
    """The model's state dict with the checkpoint's values. Raises ValueError if they do not fit."""
    own = model.state_dict()
    names = {rename(name, model): name for name in own}
    target = {rename(name, model): value for name, value in own.items()}
    # No published checkpoint contains batch norm's step counters, which do not affect the results.
    missing = {k for k in target.keys() - state.keys() if not k.endswith("num_batches_tracked")}
    shapes = {
        k: f"{k} {tuple(state[k].shape)} instead of {tuple(target[k].shape)}"
        for k in target.keys() & state.keys()
        if state[k].shape != target[k].shape
    }
    problems = [
        f"{what}: {_some(entries)}"
        for what, entries in (
            ("missing", missing),
            ("unexpected", state.keys() - target.keys()),
            ("of another shape", shapes.values()),
        )
        if entries
    ]
    if problems:
        raise ValueError(f"checkpoint: its keys do not fit the model; {'; '.join(problems)}")
    return {names[k]: state[k] if k in state else target[k] for k in target}


def _some(names: Any) -> str:
    first, *rest = sorted(names)
    shown = ", ".join([first, *rest[:4]])
    return shown if len(rest) <= 4 else f"{shown} and {len(rest) - 4} more"
