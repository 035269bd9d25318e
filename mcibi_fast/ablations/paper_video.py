"""Tables 16 and 17: image models against video models (section 5).

The other video models of Table 17 are trained and tested as Video-MCIBI++ is: on clips of past
frames, of which the last one has labels, and on streams. In VSPW's own protocol TCB sees future
frames.
"""

from __future__ import annotations

import math
from typing import Any

from mcibi_fast.ablations.runs import TrainedRun
from mcibi_fast.ablations.table import (
    MEAN_IOU,
    PIXEL_ACCURACY,
    SECONDS,
    Column,
    Measure,
    Row,
    Scores,
    Table,
)
from mcibi_fast.data.video import whole_videos
from mcibi_fast.inference.evaluate_video import evaluate_videos, usual_flow
from mcibi_fast.models import registry

PROTOCOL = "vspw2021"
_SPLIT = "whole videos"

# With these settings a row takes minutes on one core.
_SMALL = (
    "data.size=[96,96]",
    "augmentation.crop_size=[80,80]",
    "model.options.feats_channels=32",
    "model.options.transform_channels=16",
    "epochs=5",
    "evaluate_every=5",
    "workers=0",
)


def on_videos(run: TrainedRun, **options: Any) -> dict[str, Scores]:
    """All scores of Table 17 over the validation split's videos, each frame computed once.

    Args:
        run: the trained run.
        options: options of the model that replace those it was trained with.
    """
    dataset = run.validation()
    assert whole_videos(dataset)
    scores = evaluate_videos(
        run.model(**options),
        dataset,
        protocol=PROTOCOL,
        flow=usual_flow(dataset, run.device()),
        inference=run.config.inference,
        workers=run.config.workers,
        accelerator=run.accelerator(),
        progress=run.progress,
    ).compute()
    assert scores.tc is not None
    windows = [f"VC_{vc.window}: {vc.windows} windows, {vc.empty} empty" for vc in scores.vc]
    run.remark(
        f"Protocol {PROTOCOL}; TC: {scores.tc.pairs} pairs of frames, flow: {scores.tc.flow}; "
        f"{'; '.join(windows)}."
    )
    fractions = {
        "mIoU": scores.mean_iou,
        "pixel_accuracy": scores.frames.pixel_accuracy,
        "mean_class_accuracy": scores.frames.mean_class_accuracy,
        "TC": scores.tc.score,
        **{f"VC_{vc.window}": vc.score for vc in scores.vc},
    }
    return {_SPLIT: {n: 100 * value for n, value in fractions.items() if not math.isnan(value)}}


def with_memory_frames(run: TrainedRun) -> dict[str, Scores]:
    """As :func:`on_videos`, of TCB with the regions of the last eight frames (st-ocr-mem)."""
    return on_videos(run, memory_frames=8)


def _peer(name: str, model: str, versus: str, *printed: float, measure: Measure = on_videos) -> Row:
    """Another video model; its number of past frames and their distance are its usual ones."""
    method = model.partition("_")[2]
    history, gap = registry.parse(model).history, registry.usual_gap(method)
    settings = [f"model.name={model}", f"data.history={history}"]
    settings += [f"data.gap={gap}"] if gap > 1 else []
    mean_iou, *rest = printed
    numbers = (mean_iou, None, None, *rest, *_NONE)
    return Row(name, tuple(settings), numbers, measure, _SPLIT, versus)


def _row(
    name: str,
    model: str,
    *printed: float | None,
    versus: str | None = None,
    **options: str | int,
) -> Row:
    settings = [f"model.name={model}"] if model != "upernet_mcibipp" else []
    settings += [f"model.options.{option}={value}" for option, value in options.items()]
    if "history" in options:
        settings.append(f"data.history={options['history']}")
    return Row(name, tuple(settings), printed, on_videos, _SPLIT, versus)


def _image(name: str, model: str, *printed: float | None) -> Row:
    return _row(name, model, *printed, versus="UperNet")


def _video(name: str, model: str, *printed: float | None, history: int, past: str) -> Row:
    return _row(
        name,
        f"upernet_video_{model}",
        *printed,
        versus=name.replace("Video-", "") if "Video-" in name else None,
        history=history,
        past=past,
    )


_NONE = (None,) * 6
_CONSISTENCY = (Column("TC", "TC"), Column("VC_8", "VC_8"), Column("VC_16", "VC_16"))
_NOTE = (
    "All rows are trained in the same way, as in the paper: none starts from the weights of "
    "another, and all take the same number of steps on the same labelled frames; a video model "
    "also sees past frames and takes longer. Measured by streaming, each frame once, in order."
)

TABLE_16 = Table(
    "Video-MCIBI++: how many past frames, and what is taken from them (Eq. 19)",
    "Table 16, VSPW val, ResNet-50",
    ("mIoU",),
    (
        _row("UperNet+MCIBI++", "upernet_mcibipp", 41.08),
        *(
            _video(
                f"h={h} {'R' if past == 'features' else 'C_bi'}",
                "mcibipp",
                value,
                history=h,
                past=past,
            )
            for h, past, value in (
                (1, "features", 41.54),
                (1, "context", 42.06),
                (2, "features", 41.85),
                (2, "context", 42.39),
                (3, "features", 41.07),
                (3, "context", 42.40),
            )
        ),
    ),
    model="upernet_mcibipp",
    columns=(MEAN_IOU, *_CONSISTENCY, SECONDS),
    note="UperNet+Video-MCIBI++ with h past frames; R: R_(N-i) instead of C_bi^(N-i). " + _NOTE,
    videos=True,
    base={"moving_scenes": _SMALL, "vspw": ("model.backbone=resnet50",)},
)

TABLE_17 = Table(
    "image models and video models on videos",
    "Table 17, VSPW val; R-101: ResNet-101, Swin-L: Swin-Large",
    tuple(
        f"{score} {backbone}"
        for backbone in ("R-101", "Swin-L")
        for score in ("mIoU", "pixel acc.", "class acc.", "TC", "VC_8", "VC_16")
    ),
    (
        _image("DeepLabV3Plus", "deeplabv3plus", 34.67, None, None, 65.45, 83.24, 78.24, *_NONE),
        _image("UperNet", "upernet", 36.46, None, None, 63.10, 82.55, 76.08, *_NONE),
        _image("PSPNet", "pspnet", 36.47, None, None, 65.89, 84.16, 79.63, *_NONE),
        _image("OCRNet", "ocrnet", 36.68, None, None, 66.21, 83.97, 79.04, *_NONE),
        _image(
            "UperNet+MCIBI",
            "upernet_mcibi",
            42.11,
            73.85,
            53.42,
            68.15,
            82.11,
            76.52,
            55.18,
            81.22,
            64.65,
            75.75,
            89.52,
            86.13,
        ),
        _image(
            "UperNet+MCIBI++",
            "upernet_mcibipp",
            43.21,
            75.15,
            55.64,
            70.06,
            83.62,
            78.48,
            56.04,
            81.70,
            65.43,
            76.40,
            90.07,
            87.01,
        ),
        _peer("ETC+PSPNet", "pspnet_etc", "PSPNet", 36.55, 67.94, 84.10, 79.22),
        _peer("NetWarp+PSPNet", "pspnet_netwarp", "PSPNet", 36.95, 67.85, 84.36, 79.42),
        _peer("ETC+OCRNet", "ocrnet_etc", "OCRNet", 37.46, 68.99, 84.10, 79.10),
        _peer("NetWarp+OCRNet", "ocrnet_netwarp", "OCRNet", 37.52, 68.89, 84.00, 78.97),
        _peer("TCB_st-ppm", "pspnet_tcb", "PSPNet", 37.46, 70.30, 86.95, 82.12),
        _peer("TCB_st-ocr", "ocrnet_tcb", "OCRNet", 37.40, 72.20, 86.88, 82.04),
        _peer(
            "TCB_st-ocr-mem",
            "ocrnet_tcb",
            "OCRNet",
            37.82,
            73.63,
            87.86,
            83.99,
            measure=with_memory_frames,
        ),
        _video(
            "UperNet+Video-MCIBI",
            "mcibi",
            *_NONE,
            57.57,
            81.97,
            68.58,
            80.90,
            90.67,
            87.39,
            history=2,
            past="context",
        ),
        _video(
            "UperNet+Video-MCIBI++",
            "mcibipp",
            *_NONE,
            58.88,
            82.20,
            69.00,
            81.21,
            91.53,
            88.50,
            history=2,
            past="context",
        ),
    ),
    model="upernet_mcibipp",
    columns=(
        MEAN_IOU,
        PIXEL_ACCURACY,
        Column("mean_class_accuracy", "class accuracy"),
        *_CONSISTENCY,
        SECONDS,
    ),
    note="Δ compares a video model with its image model (in the paper's columns, with Swin-L for "
    "Video-MCIBI and Video-MCIBI++), and an image model with UperNet. ETC and NetWarp take flow "
    "from DIS (RAFT on VSPW, as VSPW's authors did; model.options.flow says which). TCB sees three "
    "past frames, three apart, where VSPW's own test sees future ones; st-ocr-mem is st-ocr tested "
    "with the regions of the last eight frames. " + _NOTE,
    videos=True,
    base={"moving_scenes": _SMALL, "vspw": ("model.options.flow=raft",)},
)
