"""``mcibi-fast video``."""

from __future__ import annotations

import argparse

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_folder
from mcibi_fast.terminal import complain, say

HELP = "write label maps and an overlay of a video"
EXTRA = "train"
EXAMPLES = (
    "mcibi-fast video runs/first clip.mp4 --out video",
    "mcibi-fast video runs/first frames/ --every 2 --no-overlay",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model and video, and where predictions go."""
    options.add_checkpoint(parser, ", of any model")
    parser.add_argument(
        "source", metavar="SOURCE", help="a video file, a folder of frames, or a camera's number"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="video",
        help="default: video; what an earlier one left is removed",
    )
    parser.add_argument("--no-overlay", action="store_true", help="write label maps only")
    parser.add_argument(
        "--every", metavar="N", type=int, default=1, help="use every N-th frame (default: 1)"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="stop after N frames")
    options.add_inference(parser, large=True)
    options.add_precision(parser)
    options.add_own_size(parser)
    options.add_fold(parser)
    options.add_compile(parser)
    options.add_cpu(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Predicts a video's frames as a stream; those that cannot be used are counted."""
    from mcibi_fast.commands.run_settings import (
        compiled,
        inference_config,
        large_window,
        prepared,
        set_precision,
        start_accelerator,
    )
    from mcibi_fast.inference.predict_video import predict_video
    from mcibi_fast.inference.trained import mirrored_classes, trained_config
    from mcibi_fast.models.checkpoint import load_model
    from mcibi_fast.models.weights import find_weights
    from mcibi_fast.recipes.sources import Sized, eval_transform

    check_folder("--out", args.out)
    file = find_weights(args.checkpoint)
    trained = trained_config(file)
    inference = inference_config(args, trained, file)
    model, spec = load_model(file)
    data = trained.data if trained else None
    transform = None
    if isinstance(data, Sized) and not args.own_size:
        transform = eval_transform(data, spec.mean, spec.std)
    device = start_accelerator(args).device
    precision = set_precision(args, model, trained, device)
    model = prepared(args, model, spec.name)
    compile_time = compiled(args, model.to(device))
    result = predict_video(
        model,
        spec,
        args.source,
        args.out,
        overlay=not args.no_overlay,
        every=args.every,
        limit=args.limit,
        inference=inference,
        large_window=large_window(args, trained),
        transform=transform,
        flip_pairs=mirrored_classes(data) if inference.flip else (),
        device=device,
        progress=not args.quiet,
    )
    if compile_time is not None:
        compile_time.tell()
    maps = "label map" if result.frames == 1 else "label maps"
    also = f" and {result.video.name}" if result.video else ""
    say(
        f"{result.frames} {maps}{also} in {args.out}, {precision}, "
        f"{result.rate:.1f} frames per second"
    )
    if result.window:
        say(
            f"in windows of {result.window[0]}x{result.window[1]}, as the frames are large "
            "(--window none takes them whole)"
        )
    if result.faults():
        complain(f"warning: {result.faults()}")
    return 0
