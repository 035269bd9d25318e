"""``mcibi-fast evaluate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_file
from mcibi_fast.files import write_text
from mcibi_fast.protocols import PROTOCOLS
from mcibi_fast.terminal import complain, printable, say

if TYPE_CHECKING:
    import torch

    from mcibi_fast.data import SegmentationDataset
    from mcibi_fast.data.video import ClipDataset, VideoDataset
    from mcibi_fast.metrics import FlowFunction, SegmentationMetrics

HELP = "score a checkpoint on a split"
EXTRA = "train"
EXAMPLES = (
    "mcibi-fast evaluate runs/first",
    "mcibi-fast evaluate runs/first --scales 0.75,1,1.25 --flip --json scores.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model and data, and how it is scored."""
    options.add_checkpoint(parser, above=True)
    parser.add_argument(
        "--dataset", metavar="NAME", help="a dataset other than the run's, such as cihp"
    )
    options.add_root(parser)
    options.add_masks(parser, of_run=True)
    parser.add_argument("--split", help="default: the run's validation split")
    options.add_inference(parser, scores=True)
    options.add_precision(parser)
    options.add_fold(parser)
    options.add_compile(parser)
    parser.add_argument("--without-class", metavar="K", help="also report means without K,...")
    parser.add_argument(
        "--flow", metavar="F", help="for TC of videos: dis, raft, a file of RAFT, or none"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the scores to FILE")
    parser.add_argument(
        "--batch-size",
        metavar="B",
        type=int,
        default=1,
        help="images at a time, all of one size (default: 1)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=2,
        help="processes that load images (default: 2)",
    )
    options.add_cpu(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the per-class table of a checkpoint on a split, and the scores; of videos also TC and
    VC.
    """
    from mcibi_fast.commands.run_settings import (
        chosen_protocol,
        class_indices,
        compiled,
        evaluation_data,
        inference_config,
        prepared,
        set_precision,
        start_accelerator,
    )
    from mcibi_fast.data.video import whole_videos
    from mcibi_fast.inference.evaluate import evaluate
    from mcibi_fast.inference.evaluate_video import evaluate_videos
    from mcibi_fast.inference.trained import trained_config
    from mcibi_fast.models.checkpoint import load_model
    from mcibi_fast.models.weights import find_weights, moved_class
    from mcibi_fast.recipes import MovingScenesData, VideoData

    if args.batch_size < 1 or args.workers < 0:
        raise ValueError("--batch-size must be at least 1 and --workers at least 0")
    file = find_weights(args.checkpoint)
    if args.json:
        check_file("--json", args.json, inputs=[file])
    trained = trained_config(file)
    inference = inference_config(args, trained, file)
    scored_by = chosen_protocol(args, PROTOCOLS)
    data = evaluation_data(
        file,
        trained,
        args.dataset,
        args.root,
        binary=args.binary,
        reduce_labels=args.reduce_labels,
    )
    if isinstance(data, VideoData | MovingScenesData):
        data = replace(data, train_frames="all")  # training's split, too, is scored as videos
    split = args.split or data.val_split
    dataset = data.dataset(split)
    if not len(dataset):
        raise ValueError(f"--split {split}: nothing in it has labels (predict and video need none)")
    _check_video_options(dataset, protocol=scored_by, flow=args.flow)
    model, spec = load_model(file, classes=dataset.classes)
    if moved := moved_class(spec.classes, dataset.classes):
        complain(f"warning: {moved}")
    left_out = []
    if args.without_class is not None:
        left_out = class_indices("--without-class", args.without_class, len(spec.classes))
    accelerator = start_accelerator(args)
    shared: dict[str, Any] = {
        "inference": inference,
        "workers": args.workers,
        "accelerator": accelerator,
        "progress": not args.quiet,
    }
    precision = set_precision(args, model, trained, accelerator.device)
    trained_model, model = model, prepared(args, model, spec.name)
    model.to(accelerator.device)
    compile_time = compiled(args, model)
    videos = None
    if whole_videos(dataset) and not model.needs_labels:
        flow = _flow(args.flow, dataset, accelerator.device)
        counts = evaluate_videos(
            model, dataset, protocol=scored_by or PROTOCOLS[0], flow=flow, **shared
        )
        confusion, videos = counts.confusion, counts.compute()
    else:
        confusion = evaluate(model, dataset, batch_size=args.batch_size, **shared)
    if accelerator.is_main_process:
        if compile_time is not None:
            compile_time.tell()
        metrics = confusion.compute()
        names = _row_names(spec.classes, dataset.classes)
        say(f"{len(dataset)} images of {split}; {inference}; {precision}")
        say(metrics.table(names))
        if left_out:
            say(_without(metrics, left_out, names))
        if videos is not None:
            say(videos.table())
        if args.json:
            content = _scores(metrics, names, left_out)
            if videos is not None:
                content["videos"] = videos.as_dict()
            content |= {
                "checkpoint": str(file),
                "folded": model is not trained_model,
                "data": {"kind": type(data).__name__} | asdict(data),
                "split": split,
                "images": len(dataset),
                "tested_by": str(inference),
                "inference": asdict(inference),
                "precision": model.precision,
            }
            write_text(Path(args.json), json.dumps(content, indent=2) + "\n")


def _check_video_options(dataset: SegmentationDataset, **given: str | None) -> None:
    from mcibi_fast.data.video import whole_videos

    for option, value in given.items():
        if value is not None and not whole_videos(dataset):
            raise ValueError(f"--{option}: for videos, which the data are not")


def _flow(
    wanted: str | None, dataset: VideoDataset | ClipDataset, device: torch.device
) -> FlowFunction | Literal["given"] | None:
    """For TC: "dis", "raft", a file of its weights, or "none"; else what `usual_flow` finds."""
    from mcibi_fast.inference.evaluate_video import usual_flow
    from mcibi_fast.metrics import DISFlow, RAFTFlow

    if wanted is None:
        try:
            return usual_flow(dataset, device)
        except ValueError as error:
            complain(f"warning: TC is left out: {error}")
            return None
    if wanted == "none":
        return None
    if wanted == "dis":
        return DISFlow()
    if wanted != "raft" and not Path(wanted).is_file():
        raise ValueError(f"--flow {wanted}: expected dis, raft, a file of its weights, or none")
    return RAFTFlow(None if wanted == "raft" else wanted, device=device)


def _row_names(trained: Sequence[str], tested: Sequence[str]) -> list[str]:
    """The checkpoint's class names, with the data's where they differ."""
    return [a if a == b else f"{a} / {b}" for a, b in zip(trained, tested, strict=True)]


def _without(metrics: SegmentationMetrics, left_out: Sequence[int], names: Sequence[str]) -> str:
    some = metrics.without(left_out)
    classes = ", ".join(f"{index} ({printable(names[index])})" for index in left_out)
    return (
        f"without class {classes}: mIoU (union) {100 * some.mean_iou:.2f}, "
        f"mIoU (present) {100 * some.mean_iou_present:.2f}, "
        f"mean class accuracy {100 * some.mean_class_accuracy:.2f}"
    )


def _scores(
    metrics: SegmentationMetrics, names: Sequence[str], left_out: Sequence[int]
) -> dict[str, Any]:
    content = metrics.as_dict(names)
    if left_out:
        some = metrics.without(left_out).as_dict(names)
        kept = ("mean_iou", "mean_iou_present", "mean_class_accuracy")
        content["without_classes"] = {"indices": list(left_out)} | {k: some[k] for k in kept}
    return content
