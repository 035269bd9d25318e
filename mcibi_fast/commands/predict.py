"""``mcibi-fast predict``."""

from __future__ import annotations

import argparse

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_folder
from mcibi_fast.terminal import complain, say

HELP = "write label maps and overlays of images"
EXTRA = "train"
EXAMPLES = (
    "mcibi-fast predict runs/first photo.jpg",
    "mcibi-fast predict runs/first photos/ --out predictions --flip",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model and images, and where predictions go."""
    options.add_checkpoint(parser)
    parser.add_argument("source", metavar="SOURCE", help="an image, or a folder of images")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="predictions",
        help="default: predictions; it replaces only its own files",
    )
    options.add_inference(parser, large=True)
    options.add_precision(parser)
    options.add_own_size(parser)
    options.add_fold(parser)
    options.add_compile(parser)
    parser.add_argument(
        "--submission",
        metavar="NAME",
        nargs="?",
        const="",
        help="also write the files of a test server, such as ade20k",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write label maps only")
    options.add_overwrite(parser)
    options.add_cpu(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Predicts an image or a folder; unreadable images are counted and named."""
    from mcibi_fast.commands.run_settings import (
        compiled,
        inference_config,
        large_window,
        prepared,
        set_precision,
        start_accelerator,
        submission_data,
    )
    from mcibi_fast.data import DATASETS
    from mcibi_fast.inference.predict import predict
    from mcibi_fast.inference.trained import mirrored_classes, trained_config
    from mcibi_fast.models.checkpoint import load_model
    from mcibi_fast.models.weights import find_weights, moved_class, read_spec
    from mcibi_fast.recipes import NamedData
    from mcibi_fast.recipes.sources import eval_transform

    check_folder("--out", args.out)
    file = find_weights(args.checkpoint)
    trained = trained_config(file)
    inference = inference_config(args, trained, file)
    data = submission_data(args.submission, trained, read_spec(file).backbone)
    dataset = DATASETS.get(data.name) if isinstance(data, NamedData) else None
    window = large_window(args, trained)
    model, spec = load_model(file)
    if args.submission is not None and dataset is not None:
        moved = moved_class(spec.classes, dataset.classes)
        if moved:
            complain(f"warning: {moved}")
    transform = None
    if data is not None and not args.own_size:
        transform = eval_transform(data, spec.mean, spec.std)
    device = start_accelerator(args).device
    precision = set_precision(args, model, trained, device)
    model = prepared(args, model, spec.name)
    compile_time = compiled(args, model.to(device))
    result = predict(
        model,
        spec,
        args.source,
        args.out,
        inference=inference,
        transform=transform,
        flip_pairs=mirrored_classes(data) if inference.flip else (),
        submission=None if args.submission is None else dataset,
        overlays=not args.no_overlays,
        large_window=window,
        overwrite=args.overwrite,
        device=device,
        progress=not args.quiet,
    )
    if compile_time is not None:
        compile_time.tell()
    maps = "label map" if len(result.written) == 1 else "label maps"
    say(f"{len(result.written)} {maps} in {args.out}, {precision}")
    if window and result.in_windows:
        say(
            f"{result.in_windows} of them in windows of {window[0]}x{window[1]}, as the images are "
            "large (--window none takes them whole)"
        )
    if result.left_out:
        say(f"{result.left_out} pictures left out: predict wrote them")
    if dataset is not None and result.submitted:
        say(f"{len(result.submitted)} for {dataset.title}'s server in {args.out}/submission")
    if not result.errors:
        return 0
    shown = "; ".join(result.errors[:3])
    more = f"; and {len(result.errors) - 3} more" if len(result.errors) > 3 else ""
    complain(f"error: {len(result.errors)} unreadable: {shown}{more}")
    return 2
