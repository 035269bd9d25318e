"""Tables 16 and 17: image models against video models (section 5)."""

from __future__ import annotations

import math

from mcibi_fast.ablations.runs import TrainedRun
from mcibi_fast.ablations.table import MEAN_IOU, PIXEL_ACCURACY, SECONDS, Column, Row, Scores, Table
from mcibi_fast.data.video import whole_videos
from mcibi_fast.inference.evaluate_video import evaluate_videos, usual_flow

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


def on_videos(run: TrainedRun) -> dict[str, Scores]:
    """All scores of Table 17 over the validation split's videos, each frame computed once."""
    dataset = run.validation()
    assert whole_videos(dataset)
    scores = evaluate_videos(
        run.model(),
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


def _video(name: str, model: str, *printed: float | None, history: int, past: str) -> Row:
    return _row(
        name,
        f"upernet_video_{model}",
        *printed,
        versus=name.replace("Video-", "") if "Video-" in name else None,
        history=history,
        past=past,
    )


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

_NONE = (None,) * 6

TABLE_17 = Table(
    "image models and video models on videos",
    "Table 17, VSPW val; R-101: ResNet-101, Swin-L: Swin-Large",
    tuple(
        f"{score} {backbone}"
        for backbone in ("R-101", "Swin-L")
        for score in ("mIoU", "pixel acc.", "class acc.", "TC", "VC_8", "VC_16")
    ),
    (
        _row("UperNet", "upernet", 36.46, None, None, 63.10, 82.55, 76.08, *_NONE),
        _row(
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
        _row(
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
    note="Δ compares a video model with its image model (in the paper's columns, with Swin-L), and "
    "an image model with UperNet. " + _NOTE,
    videos=True,
    base={"moving_scenes": _SMALL},
)
