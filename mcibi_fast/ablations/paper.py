"""The ablation tables with the numbers that the paper prints."""

from __future__ import annotations

from mcibi_fast.ablations.measures import four_stages, lip_and_cihp
from mcibi_fast.ablations.table import MEAN_IOU, SECONDS, Column, Row, Table

_ADE20K = "ADE20K val, ResNet-50, stride 8"
_FCN = ("model.name=fcn",)


def _option(name: str, *values: tuple[str, float | None]) -> tuple[Row, ...]:
    """One row per value of a model's option."""
    return tuple(Row(v, (f"model.options.{name}={v}",), (printed,)) for v, printed in values)


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

TABLE_4 = Table(
    "the memory's momentum m (Eq. 6)",
    f"Table 4, {_ADE20K}",
    ("mIoU",),
    (
        *_option("momentum", ("0.01", 42.06), ("0.05", 42.89)),
        Row("0.1", (), (43.39,)),
        *_option("momentum", ("0.3", 42.71), ("0.5", 42.72), ("0.7", 43.23), ("0.9", 42.95)),
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
    return Row(name, (), printed, four_stages, f"stages={number}")


TABLE_6 = Table(
    "stages of coarse-to-fine iterative inference, on one trained model (section 3.5)",
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
    note="ms is the fastest of several passes over the first validation image. The trade-off is "
    "points of mIoU gained per millisecond added, both against the stage before.",
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
    note="Each framework with MCIBI++ is compared with itself without.",
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
        Column("pixel_accuracy", "pixel accuracy"),
        SECONDS,
    ),
    note="Class 10 is jumpsuits in LIP and torso skin in CIHP; without it, its pixels do not count "
    "and the mean is over the other 19 classes. Each framework with MCIBI++ is compared with "
    "itself without, on the same test set.",
    data="lip",
    test_data="cihp",
)

TABLES = {
    "2": TABLE_2,
    "4": TABLE_4,
    "5": TABLE_5,
    "6": TABLE_6,
    "8": TABLE_8,
    "9": TABLE_9,
}
"""By the name that the command line knows them by."""
