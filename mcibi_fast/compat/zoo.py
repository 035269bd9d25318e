"""The published checkpoints of MCIBI++, MCIBI and ISNet: what their files do not show.

A checkpoint has names and shapes, but neither slopes, dilations nor how it was tested. This is the
model zoo of sssegmentation, revision eb1878c, in the project's own words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Method = Literal["mcibiplusplus", "mcibi", "isnet"]
Context = Literal["none", "ppm", "aspp"]

CLASSES = {
    "ade20k": 150,
    "cityscapes": 19,
    "cocostuff10k": 182,
    "lip": 20,
    "pascalcontext59": 59,
    "voc": 21,
    "vspw": 124,
}
"""Number of classes of each dataset, by the dataset's name in the names of the checkpoints."""

BY_SHAPES = "by its shapes"
BY_STRUCTURE = "by its dataset and structure, though its widths are others"
_OWN_NAMES = {"coco_stuff": "cocostuff10k", "pascal_context": "pascalcontext59"}


@dataclass(frozen=True)
class Layout:
    """What names and shapes show of a checkpoint.

    Attributes:
        method: whose head it has.
        backbone: "resnet50os8", "hrnetv2w48", ..., by family and number of blocks; "" for any
            other.
        classes: K.
        context: the context within the image.
        pyramid: channels of UperNet's maps after the last convolutions, divided by Z; 0 without a
            pyramid.
        extra_attention: see :class:`mcibi_fast.models.mcibipp.MCIBIPPHead`.
        kernel_sizes: of the classifiers' first convolutions (pr, cwi, cls).
        downsample: a stride-2 convolution before the attention (MCIBI++) or the head (MCIBI).
        shortcut: ISNet's shortcut from the finest map.
        other_widths: Z or the backbone's channels are not those of the published checkpoints.
    """

    method: Method
    backbone: str
    classes: int
    context: Context = "none"
    pyramid: float = 0
    extra_attention: bool = False
    kernel_sizes: tuple[int, int, int] = (1, 1, 1)
    downsample: bool = False
    shortcut: bool = False
    other_widths: bool = False


@dataclass(frozen=True)
class Hidden:
    """What no name and no shape shows. The defaults are what most published checkpoints have.

    Attributes:
        weights_from: whose logits are the weights W (MCIBI++ with a within-image context).
        dilations: of ASPP.
        stem_relu: whether a ReLU follows the first batch norm of HRNet.
        negative_slope: of the head's LeakyReLUs; 0 means ReLU.
    """

    weights_from: Literal["auto", "pr"] = "auto"
    dilations: tuple[int, ...] = (1, 12, 24, 36)
    stem_relu: bool = True
    negative_slope: float = 0.0


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        name: the file's name without ".pth".
        dataset: one of :data:`CLASSES`.
        layout, hidden: see there.
        size: (short side, long side) of a test image, or (height, width) of LIP, which does not
            keep proportions.
        inference: how it was tested, as fields of :class:`mcibi_fast.recipes.InferenceConfig`.
    """

    name: str
    dataset: str
    layout: Layout
    hidden: Hidden
    size: tuple[int, int]
    inference: dict[str, Any] = field(hash=False)


def identify(
    layout: Layout, *, names: tuple[str, ...] = (), dataset: str | None = None
) -> tuple[Published | None, str]:
    """The published checkpoint that a file is, or None; and what told so, for a message.

    A file of other widths may be one by its name or its dataset, but not by its shapes alone.

    Args:
        layout: what the file shows.
        names: names that may be the checkpoint's: those of its file and of its folder.
        dataset: the dataset that it is known to be for; another one of as many classes has no
            published checkpoint.
    """
    fitting = [each for each in published() if each.layout == replace(layout, other_widths=False)]
    for each in fitting:
        if any(each.name in (name, _file_name(name)) for name in names):
            return each, "by its name"
    if dataset is not None:
        known = _OWN_NAMES.get(dataset, dataset)
        how = BY_STRUCTURE if layout.other_widths else "by its dataset and shapes"
        fitting = [each for each in fitting if each.dataset == known]
        return (fitting[0], how) if fitting else (None, "")
    if layout.other_widths or not fitting:
        return None, ""
    return fitting[0], BY_SHAPES


def _file_name(name: str) -> str:
    """The name of a checkpoint's file from that of its configuration; MCIBI's files are shorter."""
    for long, short in _SHORT.items():
        name = name.replace(f"_{long}_", f"_{short}_") if name.startswith("mcibi_") else name
    return name


_SHORT = {"resnet50os8": "r50", "resnet101os8": "r101", "resnest101os8": "s101"}
_SIZES = {
    "cityscapes": (1024, 2048),
    "lip": (473, 473),
    "pascalcontext59": (520, 520),
}  # all others: 512, 2048

# MCIBI++. Per row: head and backbone, context, channels of the pyramid divided by Z, "+" for the
# extra attention, kernel sizes; then the datasets.
_MCIBIPP = """
resnet50os8                none 0    - 111  ade20k cityscapes cocostuff10k lip
ppm_resnet50os8            ppm  0    + 111  ade20k lip
ppm_resnet50os8            ppm  0    - 333  cityscapes
ppm_resnet50os8            ppm  0    + 113  cocostuff10k
aspp_resnet50os8           aspp 0    - 113  ade20k
aspp_resnet50os8           aspp 0    + 111  cityscapes lip
aspp_resnet50os8           aspp 0    + 113  cocostuff10k
aspp_resnet101os8          aspp 0    + 113  cityscapes
aspp_resnest101os8         aspp 0    + 113  cityscapes
aspp_hrnetv2w48            aspp 0    - 133  cityscapes
aspp_hrnetv2w48            aspp 0    - 113  lip
upernet_resnet50os8        ppm  1    - 113  ade20k cocostuff10k lip
upernet_resnet50os8        ppm  2    - 111  cityscapes
upernet_resnet50os8        aspp 1    - 113  voc vspw
upernet_resnet101os8       aspp 1    - 113  ade20k cocostuff10k pascalcontext59 vspw
upernet_resnet101os8       ppm  1    - 113  lip voc
upernet_resnest101os8      aspp 1    - 113  ade20k pascalcontext59
upernet_resnest101os8      ppm  1    - 113  lip
upernet_resnest101os8      ppm  1    - 133  cocostuff10k
upernet_swinlarge          aspp 1    + 113  ade20k
upernet_swinlarge          aspp 1    - 113  cocostuff10k pascalcontext59
upernet_swinlarge          ppm  1    - 111  lip
upernet_swinlarge          ppm  1    + 133  vspw
"""


def published() -> list[Published]:
    """All published checkpoints."""
    return [*_mcibipp(), *_mcibi(), *_isnet()]


def _mcibipp() -> Iterator[Published]:
    for row in _MCIBIPP.strip().splitlines():
        model, context, pyramid, attention, kernels, *datasets = row.split()
        backbone = model.rpartition("_")[2]
        pr, cwi, cls = map(int, kernels)
        for dataset in datasets:
            layout = Layout(
                "mcibiplusplus",
                backbone,
                CLASSES[dataset],
                context,  # type: ignore[arg-type]
                pyramid=int(pyramid),
                extra_attention=attention == "+",
                kernel_sizes=(pr, cwi, cls),
                downsample=backbone == "hrnetv2w48",
            )
            hidden = _hidden(backbone, dataset)
            if model == "ppm_resnet50os8" and dataset == "ade20k":
                hidden = replace(hidden, weights_from="pr")
            test = {}
            if dataset == "cityscapes" and backbone != "resnet50os8":
                test = _CITYSCAPES_TEST
            elif dataset == "pascalcontext59":
                test = _windows(480, 320)
            elif dataset == "vspw" or (backbone, dataset) == ("swinlarge", "cocostuff10k"):
                test = _windows(512, 341)
            elif (backbone, dataset) == ("swinlarge", "ade20k"):
                test = _windows(640, 426)
            yield _entry(f"mcibiplusplus_{model}_{dataset}", dataset, layout, hidden, test)


def _mcibi() -> Iterator[Published]:
    for backbone in ("resnet50os8", "resnet101os8", "resnest101os8", "hrnetv2w48", "vitlarge"):
        for dataset in ("ade20k", "cityscapes", "cocostuff10k", "lip"):
            if backbone == "vitlarge" and dataset in ("cityscapes", "lip"):
                continue
            halved = backbone == "hrnetv2w48" and dataset in ("cityscapes", "lip")
            layout = Layout("mcibi", backbone, CLASSES[dataset], "aspp", downsample=halved)
            hidden = _hidden(backbone, dataset)
            if dataset == "lip" and backbone in ("resnet50os8", "resnet101os8"):
                hidden = replace(hidden, negative_slope=0.01)
            if (backbone, dataset) == ("vitlarge", "ade20k"):
                hidden = replace(hidden, dilations=(1, 6, 12, 18))
            test = _CITYSCAPES_TEST if dataset == "cityscapes" else {}
            if backbone == "vitlarge":
                test = _windows(512, 341)
            name = f"mcibi_deeplabv3_{_SHORT.get(backbone, backbone)}_{dataset}"
            yield _entry(name, dataset, layout, hidden, test)


def _isnet() -> Iterator[Published]:
    for backbone in ("resnet50os8", "resnet101os8", "resnest101os8"):
        for dataset in ("ade20k", "cityscapes", "cocostuff10k", "lip"):
            lip = dataset == "lip"
            layout = Layout("isnet", backbone, CLASSES[dataset], shortcut=lip)
            hidden = replace(_hidden(backbone, dataset), negative_slope=0.01 if lip else 0.0)
            yield _entry(f"isnet_{backbone}_{dataset}", dataset, layout, hidden, {})


def _hidden(backbone: str, dataset: str) -> Hidden:
    return Hidden(stem_relu=not (backbone == "hrnetv2w48" and dataset == "cityscapes"))


def _entry(
    name: str, dataset: str, layout: Layout, hidden: Hidden, test: dict[str, Any]
) -> Published:
    size = _SIZES.get(dataset, (512, 2048))
    if name == "mcibiplusplus_upernet_swinlarge_ade20k":
        size = (640, 2560)
    return Published(name, dataset, layout, hidden, size, {"protocol": "released"} | test)


def _windows(window: int, stride: int) -> dict[str, Any]:
    """Sliding windows whose probabilities are averaged."""
    return {"window": [window, window], "stride": [stride, stride], "softmax": "stride"}


# Those whose numbers are from Cityscapes' test server.
_CITYSCAPES_TEST: dict[str, Any] = {
    "scales": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
    "flip": True,
    "window": [1024, 512],
    "stride": [341, 341],
    "softmax": "stride",
}
