"""The ablation tables with the numbers that the paper prints."""

from __future__ import annotations

from mcibi_fast.ablations.controls import CODES, HEAD
from mcibi_fast.ablations.measures import (
    by_ground_truth,
    four_stages,
    lip_and_cihp,
    two_stages,
    under_attack,
)
from mcibi_fast.ablations.paper_methods import (
    TABLE_10,
    TABLE_11,
    TABLE_12,
    TABLE_13,
    TABLE_14,
    TABLE_15,
)
from mcibi_fast.ablations.paper_video import TABLE_16, TABLE_17
from mcibi_fast.ablations.table import MEAN_IOU, PIXEL_ACCURACY, SECONDS, Column, Row, Table

_ADE20K = "ADE20K val, ResNet-50, stride 8"
_FCN = ("model.name=fcn",)


def _option(name: str, *values: tuple[str, float | None]) -> tuple[Row, ...]:
    """One row per value of a model's option."""
    return tuple(Row(v, (f"model.options.{name}={v}",), (printed,)) for v, printed in values)


TABLE_1 = Table(
    "why coarse to fine: what the ground truth as the weights W would bring",
    f"Table 1, {_ADE20K}",
    ("mIoU",),
    (
        Row("FCN", _FCN, (36.96,)),
        Row("FCN+MCIBI++", (), (43.39,)),
        Row("FCN+GT-MCIBI++", ("model.options.weights_from=labels",), (68.82,)),
        Row(
            "FCN+MCIBI++ tested with GT",
            (),
            (),
            by_ground_truth,
            "model.options.weights_from=labels",
        ),
    ),
    note="GT: W is the one-hot ground truth, in training and in testing; the last row is the model "
    "of the second row, with the ground truth in testing only. The paper does not say which of the "
    "two it means.",
)

TABLE_2 = Table(
    "the transform F_T that fuses R and C_bi (Eq. 4)",
    f"Table 2, {_ADE20K}",
    ("mIoU",),
    (
        Row("FCN", _FCN, (36.96,)),
        Row("add", ("model.options.fusion=add",), (41.15,)),
        Row("weighted add", ("model.options.fusion=weighted_add",), (42.06,)),
        Row("concatenation", (), (43.39,)),
    ),
)

TABLE_3 = Table(
    "the memory: none, representations (Memory-R), distributions (Memory-D)",
    f"Table 3, {_ADE20K}",
    ("mIoU",),
    (
        Row("FCN", _FCN, (36.96,)),
        Row(
            "Memory-R fixed",
            ("model.name=fcn_mcibi", "model.options.memory_update=false"),
            (21.78,),
        ),
        Row("Memory-R updated", ("model.name=fcn_mcibi",), (42.18,)),
        Row("Memory-D updated", (), (43.39,)),
        Row("Memory-D updated + IIS", (), (43.74,), two_stages, "inference.stages=2"),
    ),
    note="IIS: two stages of inference with the same model as the row above. Memory-R is MCIBI "
    "with its own momentum, schedule and loss of the memory; when fixed, it keeps what it first "
    "saw of a class.",
)

TABLE_4 = Table(
    "the memory's momentum m (Eq. 6)",
    f"Table 4, {_ADE20K}",
    ("mIoU",),
    (
        *_option("momentum", ("0.01", 42.06), ("0.05", 42.89)),
        Row("0.1", (), (43.39,)),
        *_option("momentum", ("0.3", 42.71), ("0.5", 42.72), ("0.7", 43.23), ("0.9", 42.95)),
        Row(
            "0.9-Poly",
            ("model.options.momentum=0.9", "model.options.momentum_schedule=poly"),
            (42.45,),
        ),
    ),
)

TABLE_5 = Table(
    "alpha, the weight of the loss of W (Eq. 16)",
    f"Table 5, {_ADE20K}",
    ("mIoU",),
    (
        *_option("alpha", ("0.2", 43.35)),
        Row("0.4", (), (43.39,)),
        *_option("alpha", ("0.6", 43.25), ("0.8", 42.83), ("1.0", 42.22)),
    ),
)


def _stage(number: int, *printed: float | None) -> Row:
    name = "1 stage" if number == 1 else f"{number} stages"
    return Row(name, (), printed, four_stages, f"inference.stages={number}")


TABLE_6 = Table(
    "stages of coarse-to-fine iterative inference (section 3.5)",
    f"Table 6, {_ADE20K}, one A100; W's scores from section 4.2",
    ("mIoU", "ms", "trade-off", "W mIoU", "W pixel accuracy"),
    (
        _stage(1, 43.39, 34.91, None, 36.44, 77.03),
        _stage(2, 43.74, 49.33, 0.024, 40.89, 79.40),
        _stage(3, 43.85, 58.19, 0.012, None, None),
        _stage(4, 43.91, 74.72, 0.004, None, None),
    ),
    columns=(
        MEAN_IOU,
        Column("ms", "ms"),
        Column("trade_off", "trade-off", digits=3),
        Column("W_mIoU", "W mIoU"),
        Column("W_pixel_accuracy", "W pixel accuracy"),
    ),
    note="All stages belong to one trained model. ms is the fastest of several passes over the "
    "first validation image. The trade-off is points of mIoU gained per millisecond added, both "
    "compared with the stage before.",
)


def _framework(title: str, name: str, without: tuple[float, ...], with_: tuple[float, ...]) -> list:
    ours = () if name == "fcn" else (f"model.name={name}_mcibipp",)
    return [
        Row(title, (f"model.name={name}",), without, versus=title),
        Row(f"{title}+MCIBI++", ours, with_, versus=title),
    ]


TABLE_9 = Table(
    "five frameworks, each without and with MCIBI++",
    "Table 9, ResNet-50, stride 8",
    ("ADE20K", "Cityscapes", "LIP", "COCO-Stuff"),
    (
        *_framework("FCN", "fcn", (36.96, 75.16, 48.63, 31.76), (43.39, 78.77, 51.13, 37.38)),
        *_framework("PSPNet", "pspnet", (42.64, 79.05, 51.94, 37.40), (43.89, 79.91, 52.93, 38.47)),
        *_framework(
            "UperNet", "upernet", (43.02, 79.08, 52.95, 37.65), (44.30, 80.05, 53.92, 39.20)
        ),
        *_framework(
            "DeepLabV3", "deeplabv3", (43.19, 79.62, 52.35, 37.63), (44.85, 80.72, 53.59, 38.94)
        ),
        *_framework("ISNet", "isnet", (44.22, 79.32, 53.14, 38.06), (45.33, 80.49, 54.06, 39.33)),
    ),
    note="Each framework with MCIBI++ is compared with the same framework without it.",
)


def _parsing(title: str, name: str, printed: tuple[float, float]) -> list[Row]:
    setting = () if name == "fcn_mcibipp" else (f"model.name={name}",)
    plain = title.removesuffix("+MCIBI++")
    return [
        Row(
            f"{title} on {test}",
            setting,
            (value,),
            lip_and_cihp,
            f"tested on {test}",
            f"{plain} on {test}",
        )
        for test, value in zip(("LIP", "CIHP"), printed, strict=True)
    ]


TABLE_8 = Table(
    "generalisation: trained on LIP, tested on LIP and on CIHP",
    "Table 8, ResNet-50, stride 8",
    ("mIoU",),
    (
        *_parsing("FCN", "fcn", (48.63, 27.20)),
        *_parsing("UperNet", "upernet", (52.95, 26.84)),
        *_parsing("FCN+MCIBI++", "fcn_mcibipp", (51.13, 27.57)),
        *_parsing("UperNet+MCIBI++", "upernet_mcibipp", (53.92, 27.74)),
    ),
    columns=(
        MEAN_IOU,
        Column("mIoU_without_10", "mIoU without class 10"),
        PIXEL_ACCURACY,
        SECONDS,
    ),
    note="Class 10 is jumpsuits in LIP and torso skin in CIHP; without it the mean is over the "
    "other 19 classes. Each framework with MCIBI++ is compared with the same framework without it, "
    "on the same test set.",
    data="lip",
    test_data="cihp",
)

INIT = Table(
    "how the memory is initialised",
    f"section 4.2, {_ADE20K}",
    ("mIoU",),
    _option("init", ("pixel", 43.39), ("cluster", 43.43), ("standard", None)),
    note="pixel: mean and deviation of one pixel of each class. cluster: mean and deviation of the "
    "centre of each class's pixels by cosine similarity. standard: 0 and 1, as in the released "
    "code.",
)

WEIGHTS = Table(
    "whose prediction is W in a model that also has a context within the image",
    f"Table 9, PSPNet+MCIBI++, {_ADE20K}",
    ("mIoU",),
    _option("weights_from", ("pr", 43.89), ("cwi", None)),
    model="pspnet_mcibipp",
    note="pr: the prediction of H_pr, as in Eq. 10. cwi: that of the head on the context within "
    "the image, as in every released checkpoint with such a context except PSPNet on ADE20K.",
)

AUGMENTATION = Table(
    "what section 6 suggests for other domains and against attacks",
    "section 6, which has no numbers",
    (),
    (
        Row("none", (), (), under_attack, "tested under FGSM, too"),
        Row(
            "style mixing",
            ("augmentation.style_mixing=0.5",),
            (),
            under_attack,
            "tested under FGSM, too",
        ),
        Row(
            "FGSM",
            ("adversarial.probability=0.5",),
            (),
            under_attack,
            "tested under FGSM, too",
        ),
    ),
    columns=(MEAN_IOU, Column("attacked_mIoU", "mIoU under FGSM"), PIXEL_ACCURACY, SECONDS),
    note="style mixing: half of the training images take the style of another one. FGSM: half of "
    "the steps train on attacked images. The attack in testing is FGSM on the model itself, with "
    "the recipe's adversarial.epsilon in units of 1/255.",
)

TABLES = {
    "1": TABLE_1,
    "2": TABLE_2,
    "3": TABLE_3,
    "4": TABLE_4,
    "5": TABLE_5,
    "6": TABLE_6,
    "8": TABLE_8,
    "9": TABLE_9,
    "10": TABLE_10,
    "11": TABLE_11,
    "12": TABLE_12,
    "13": TABLE_13,
    "14": TABLE_14,
    "15": TABLE_15,
    "16": TABLE_16,
    "17": TABLE_17,
    "init": INIT,
    "weights": WEIGHTS,
    "codes": CODES,
    "head": HEAD,
    "augmentation": AUGMENTATION,
}
"""The tables by their name on the command line."""
