"""Tables 10 to 15: other methods beside MCIBI and MCIBI++ (sections 4.4 and 4.5).

A row is a framework, alone or with a memory. The paper prints it for one or several backbones, each
of which is a column here. Rows are measured with the backbone of the base configuration.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcibi_fast.ablations.table import Row, Table

_R50, _R101, _R269 = "ResNet-50", "ResNet-101", "ResNet-269"
_S101, _S200 = "ResNeSt-101", "ResNeSt-200"
_HRNET, _VIT, _SWIN = "HRNetV2-W48", "ViT-Large", "Swin-Large"

# The paper does not name its scales; these are the released code's for the server of Cityscapes.
_MULTI_SCALE = ("inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]", "inference.flip=true")
_NOTE = (
    "A framework with a memory is compared with the same framework without it, any other with the "
    "first row. Every row is measured with the same backbone; --set model.backbone=NAME takes "
    "another one."
)

# What the released form of a framework needs besides the defaults.
_RELEASED_FORM = {"fcn": ("model.options.convs=2",)}

_Printed = tuple[str, str, Mapping[str, float]]


def _table(
    title: str,
    source: str,
    backbones: tuple[str, ...],
    *rows: _Printed,
    base: Mapping[str, tuple[str, ...]],
    left_out: str = "",
    note: str = "",
    model: str = "upernet_mcibipp",
) -> Table:
    """A table whose rows are a name, a model, and the printed mIoU by backbone (maybe none)."""
    parts = (_NOTE, note, f"Left out, as mcibi_fast lacks them: {left_out}." if left_out else "")
    return Table(
        title,
        source,
        tuple(f"mIoU {backbone}" for backbone in backbones),
        tuple(
            Row(
                name,
                (f"model.name={kind}", *_RELEASED_FORM.get(kind, ())),
                tuple(map(printed.get, backbones)) if printed else (),
                versus=name.partition("+")[0] if "+" in name else None,
            )
            for name, kind, printed in rows
        ),
        model=model,
        note=" ".join(filter(None, parts)),
        base=base,
    )


def _without(name: str, kind: str) -> _Printed:
    """A framework that the paper's table has with a memory only."""
    return name, kind, {}


_ADDED = "Rows without the paper's numbers are there for the rows that they are compared with."

TABLE_10 = _table(
    "other methods on ADE20K",
    "Table 10, ADE20K val, several scales and flipped",
    (_R101, _R269, _S101, _S200, _HRNET, _VIT, _SWIN),
    ("CCNet", "ccnet", {_R101: 45.76}),
    ("DMNet", "dmnet", {_R101: 45.50}),
    ("EncNet", "encnet", {_R101: 44.65}),
    ("PSPNet", "pspnet", {_R101: 43.29, _R269: 44.94}),
    ("PSANet", "psanet", {_R101: 43.77}),
    ("APCNet", "apcnet", {_R101: 45.38}),
    ("OCRNet", "ocrnet", {_R101: 45.28, _HRNET: 45.66}),
    ("UperNet", "upernet", {_R101: 44.85, _SWIN: 53.50}),
    ("ISNet", "isnet", {_R101: 47.31, _S101: 47.55}),
    ("MaskFormer", "maskformer", {_R101: 47.20}),
    ("DeepLabV3", "deeplabv3", {_S101: 46.91, _S200: 48.36}),
    ("SETR-MLA", "setr", {_VIT: 50.28}),
    ("DeepLabV3+MCIBI", "deeplabv3_mcibi", {_R101: 47.22, _S101: 47.36, _VIT: 50.80}),
    ("UperNet+MCIBI++", "upernet_mcibipp", {_R101: 47.93, _S101: 48.56, _SWIN: 54.52}),
    base={"ade20k": ("model.backbone=resnet101", *_MULTI_SCALE)},
    left_out="OCNet, ACNet, CPNet",
)

TABLE_11 = _table(
    "other methods on LIP",
    "Table 11, LIP val, test time augmentation",
    (_R101, _S101, _HRNET, _SWIN),
    ("CE2P", "ce2p", {_R101: 53.10}),
    ("DeepLabV3", "deeplabv3", {_R101: 54.58}),
    ("CCNet", "ccnet", {_R101: 55.47}),
    ("OCRNet", "ocrnet", {_R101: 55.60, _HRNET: 56.65}),
    ("ISNet", "isnet", {_R101: 55.41, _S101: 56.81}),
    ("DeepLabV3+MCIBI", "deeplabv3_mcibi", {_R101: 55.42, _S101: 56.34, _HRNET: 56.99}),
    _without("UperNet", "upernet"),
    ("UperNet+MCIBI++", "upernet_mcibipp", {_R101: 56.32, _S101: 57.08, _SWIN: 59.91}),
    base={"lip": ("model.backbone=resnet101", "inference.flip=true")},
    left_out="Attention, DeepLab, MMAN, BraidNet, OCNet, CorrPM, HRNet",
    note=_ADDED,
)

TABLE_12 = _table(
    "other methods on COCO-Stuff",
    "Table 12, COCO-Stuff test, several scales and flipped",
    (_R101, _S101, _HRNET, _VIT, _SWIN),
    ("DANet", "danet", {_R101: 39.70}),
    ("OCRNet", "ocrnet", {_R101: 39.50, _HRNET: 40.50}),
    ("EMANet", "emanet", {_R101: 39.90}),
    ("ISNet", "isnet", {_R101: 41.60, _S101: 42.08}),
    ("MaskFormer", "maskformer", {_R101: 39.30}),
    _without("DeepLabV3", "deeplabv3"),
    ("DeepLabV3+MCIBI", "deeplabv3_mcibi", {_R101: 41.49, _S101: 42.15, _VIT: 44.89}),
    _without("UperNet", "upernet"),
    ("UperNet+MCIBI++", "upernet_mcibipp", {_R101: 41.84, _S101: 42.71, _SWIN: 50.27}),
    base={"coco_stuff": ("model.backbone=resnet101", *_MULTI_SCALE)},
    left_out="SVCNet, ACNet",
    note=_ADDED,
)

TABLE_13 = _table(
    "other methods on Cityscapes",
    "Table 13, Cityscapes test, trained on train and val, several scales and flipped",
    (_R101, _S101, _HRNET),
    ("CCNet", "ccnet", {_R101: 81.90}),
    ("PSPNet", "pspnet", {_R101: 78.40}),
    ("PSANet", "psanet", {_R101: 80.10}),
    ("OCRNet", "ocrnet", {_R101: 81.80, _HRNET: 82.40}),
    ("DANet", "danet", {_R101: 81.50}),
    ("ANNet", "annnet", {_R101: 81.30}),
    _without("DeepLabV3", "deeplabv3"),
    ("DeepLabV3+MCIBI", "deeplabv3_mcibi", {_R101: 82.03, _S101: 81.59, _HRNET: 82.55}),
    ("DeepLabV3+MCIBI++", "deeplabv3_mcibipp", {_R101: 82.20, _S101: 81.70, _HRNET: 82.74}),
    base={
        "cityscapes": ("model.backbone=resnet101", *_MULTI_SCALE),
        "cityscapes_trainval": _MULTI_SCALE,
    },
    left_out="OCNet, ACFNet, ACNet, CPNet, SFNet, SPNet, DenseASPP, Dynamic, HRNet",
    note=f"{_ADDED} Only the test server has the labels of the paper's images: --data cityscapes "
    "trains on train and is measured on val.",
    model="deeplabv3_mcibipp",
)

TABLE_14 = _table(
    "other methods on PASCAL-Context",
    "Table 14, PASCAL-Context val, several scales and flipped",
    (_R101, _S101, _HRNET, _SWIN),
    ("EncNet", "encnet", {_R101: 51.70}),
    ("DANet", "danet", {_R101: 52.60}),
    ("ANNet", "annnet", {_R101: 52.80}),
    ("APCNet", "apcnet", {_R101: 54.70}),
    ("EMANet", "emanet", {_R101: 53.10}),
    ("OCRNet", "ocrnet", {_R101: 54.80, _HRNET: 56.20}),
    _without("UperNet", "upernet"),
    ("UperNet+MCIBI++", "upernet_mcibipp", {_R101: 56.82, _S101: 57.92, _SWIN: 64.01}),
    base={
        "pascal_context": (
            "model.backbone=resnet101",
            "optimizer.backbone_lr=0.1",
            *_MULTI_SCALE,
        )
    },
    left_out="SVCNet, CPNet, ACNet, SFNet, SPNet, HRNet",
    note=_ADDED,
)

TABLE_15 = _table(
    "other methods, all trained in the same way",
    "Table 15, VOC 2012 val, a single scale",
    (_R101, _HRNET, _R50),
    ("FCN", "fcn", {_R101: 70.59}),
    ("SemanticFPN", "semanticfpn", {_R101: 72.51}),
    ("PointRend", "pointrend", {_R101: 72.31}),
    ("ANNet", "annnet", {_R101: 78.15}),
    ("APCNet", "apcnet", {_R101: 78.99}),
    ("OCRNet", "ocrnet", {_R101: 78.82, _HRNET: 77.60}),
    ("CCNet", "ccnet", {_R101: 78.02}),
    ("CE2P", "ce2p", {_R101: 77.77}),
    ("DANet", "danet", {_R101: 77.97}),
    ("DeepLabV3", "deeplabv3", {_R101: 79.52}),
    ("DeepLabV3Plus", "deeplabv3plus", {_R101: 79.19}),
    ("DMNet", "dmnet", {_R101: 79.15}),
    ("ISANet", "isanet", {_R101: 78.60}),
    ("UperNet", "upernet", {_R101: 79.13}),
    ("PSPNet", "pspnet", {_R101: 79.04}),
    ("PSANet", "psanet", {_R101: 78.97}),
    ("Nonlocal", "nonlocalnet", {_R101: 78.89}),
    ("GCNet", "gcnet", {_R101: 78.81}),
    ("EncNet", "encnet", {_R101: 77.61}),
    ("EMANet", "emanet", {_R101: 76.43}),
    ("DNLNet", "dnlnet", {_R101: 78.37}),
    ("UperNet+MCIBI++", "upernet_mcibipp", {_R101: 80.42, _R50: 79.48}),
    base={"voc": ("model.backbone=resnet101",)},
)
