"""``mcibi-fast evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mcibi_fast.commands.run_settings import (
    class_indices,
    inference_config,
    published_data,
    trained_config,
)
from mcibi_fast.data import CAMVID_CLASSES, SegmentationDataset
from mcibi_fast.data.folder import class_list
from mcibi_fast.data.shards import holds_shards
from mcibi_fast.data.video import ClipDataset, VideoDataset, whole_videos
from mcibi_fast.files import write_atomically
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.evaluate_video import evaluate_videos, usual_flow
from mcibi_fast.metrics import DISFlow, FlowFunction, RAFTFlow, SegmentationMetrics
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import find_weights, read_spec
from mcibi_fast.recipes import (
    FolderData,
    MovingScenesData,
    NamedData,
    ScenesData,
    ShardsData,
    TrainConfig,
    VideoData,
)

Data = ScenesData | FolderData | NamedData | ShardsData


def run(args: argparse.Namespace) -> None:
    """Prints the per-class table of a checkpoint on a split, and the scores; of videos also TC and
    VC.
    """
    from accelerate import Accelerator

    if args.batch_size < 1 or args.workers < 0:
        raise ValueError("--batch-size must be at least 1 and --workers at least 0")
    file = find_weights(args.checkpoint)
    trained = trained_config(file)
    inference = inference_config(args, trained)
    data = _data(file, trained, args.dataset, args.root)
    if isinstance(data, VideoData | MovingScenesData):
        data = replace(data, train_frames="all")  # training's split, too, is scored as videos
    split = args.split or data.val_split
    dataset = data.dataset(split)
    if not len(dataset):
        raise ValueError(f"--split {split}: nothing in it has labels (predict and video need none)")
    _check_video_options(args, dataset)
    model, spec = load_model(file, classes=dataset.classes)
    left_out = []
    if args.without_class is not None:
        left_out = class_indices("--without-class", args.without_class, len(spec.classes))
    if args.fold:
        try:
            model = model.fold()
        except TypeError as error:
            raise ValueError(f"--fold: {error}") from None
    accelerator = Accelerator(cpu=args.cpu)
    options: dict[str, Any] = {
        "inference": inference,
        "workers": args.workers,
        "accelerator": accelerator,
        "progress": not args.quiet,
    }
    model.to(accelerator.device)
    videos = None
    if whole_videos(dataset) and not model.needs_labels:
        protocol = args.protocol or "vspw2021"
        flow = _flow(args.flow, dataset, accelerator.device)
        counts = evaluate_videos(model, dataset, protocol=protocol, flow=flow, **options)
        confusion, videos = counts.confusion, counts.compute()
    else:
        confusion = evaluate(model, dataset, batch_size=args.batch_size, **options)
    if accelerator.is_main_process:
        metrics = confusion.compute()
        names = _row_names(spec.classes, dataset.classes)
        print(f"{len(dataset)} images of {split}; {inference}")
        print(metrics.table(names))
        if left_out:
            print(_without(metrics, left_out, names))
        if videos is not None:
            print(videos.table())
        if args.json:
            content = _scores(metrics, names, left_out)
            if videos is not None:
                content["videos"] = videos.as_dict()
            content |= {
                "checkpoint": str(file),
                "folded": args.fold,
                "data": {"kind": type(data).__name__} | asdict(data),
                "split": split,
                "images": len(dataset),
                "inference": asdict(inference),
            }
            write_atomically(Path(args.json), (json.dumps(content, indent=2) + "\n").encode())


def _data(file: Path, trained: TrainConfig | None, dataset: str | None, root: str | None) -> Data:
    """The dataset named, or the folder or shards given, or the data that the run was trained on.

    The folder of a run on a published dataset holds that dataset, too.
    """
    data: Data | None = trained.data if trained else None
    is_own = dataset is None or (isinstance(data, NamedData) and data.name == dataset)
    if dataset is not None and not is_own:
        data = (
            FolderData(classes=list(CAMVID_CLASSES))
            if dataset == "camvid"
            else published_data(dataset, trained)
        )
    if root is None:
        if data is None:
            raise ValueError(
                f"evaluate: {file} is in no run's directory; name the data with --root DIR"
            )
        if not is_own:
            raise ValueError(f"--dataset {dataset}: say where it is with --root DIR")
        return data
    if holds_shards(root):
        return ShardsData.like(data or FolderData(), root)
    if isinstance(data, NamedData) or (isinstance(data, FolderData) and not is_own):
        return replace(data, root=root)
    # A folder that lists no classes is taken to have the checkpoint's.
    listed = class_list(Path(root)) is not None
    return FolderData(root=root, classes=None if listed else read_spec(file).classes)


def _check_video_options(args: argparse.Namespace, dataset: SegmentationDataset) -> None:
    for option in ("protocol", "flow"):
        if getattr(args, option) is not None and not whole_videos(dataset):
            raise ValueError(f"--{option}: for videos, which the data are not")


def _flow(
    wanted: str | None, dataset: VideoDataset | ClipDataset, device: torch.device
) -> FlowFunction | Literal["given"] | None:
    """For TC: "dis", "raft", a file of its weights, or "none"; else what `usual_flow` finds."""
    if wanted is None:
        try:
            return usual_flow(dataset, device)
        except ValueError as error:
            print(f"mcibi-fast: warning: TC is left out: {error}", file=sys.stderr)
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
    classes = ", ".join(f"{index} ({names[index]})" for index in left_out)
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
