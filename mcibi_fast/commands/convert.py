"""``mcibi-fast convert``: a released checkpoint as a weights file of this package."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mcibi_fast.commands.outputs import check_file
from mcibi_fast.files import write_atomically
from mcibi_fast.terminal import say

HELP = "make a weights file of a released checkpoint"
EXTRA = "train"
EXAMPLES = (
    "mcibi-fast convert released.pth model.safetensors --dataset ade20k",
    "mcibi-fast convert own.pth model.safetensors --classes road,sky,car",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, into which file, and what its classes are called."""
    parser.add_argument("checkpoint", help="a file of the authors' released code (sssegmentation)")
    parser.add_argument("out", help="the .safetensors file to write")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", metavar="A,B,...", help="class names (default: class_0, ...)")
    classes.add_argument("--dataset", metavar="NAME", help="names and colours of ade20k, lip, ...")
    parser.add_argument(
        "--weights-from",
        choices=["auto", "pr", "cwi"],
        default="auto",
        help="the head that predicts the weights W; auto knows the published checkpoints",
    )
    parser.add_argument(
        "--stem-relu",
        action=argparse.BooleanOptionalAction,
        help="whether HRNet's stem has a ReLU after its first batch norm (default: as published; "
        "no for 19 classes, yes for others)",
    )
    parser.add_argument(
        "--negative-slope",
        type=float,
        metavar="S",
        help="slope of the head's LeakyReLUs (default: as published; 0 for others, a ReLU)",
    )
    parser.add_argument(
        "--dilations",
        type=_dilations,
        metavar="A,B,...",
        help="dilations of ASPP (default: as published; 1,12,24,36 for others)",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="convert the averaged weights (model_ema) if there are some (default: no)",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the weights file and says what is in it."""
    from mcibi_fast.compat import sssegmentation
    from mcibi_fast.compat.convert import convert
    from mcibi_fast.models.weights import pack_weights

    source, out = Path(args.checkpoint), Path(args.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"convert: the result is a .safetensors file, not {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"convert: there is no folder {out.parent}")
    check_file("convert", out, inputs=[source, sssegmentation.followed(source)])
    loaded, published, notes = sssegmentation.load_published(
        source,
        dataset=args.dataset,
        ema=args.ema,
        weights_from=args.weights_from,
        stem_relu=args.stem_relu,
        negative_slope=args.negative_slope,
        dilations=args.dilations,
    )
    names, palette = class_list(args, loaded.head.num_classes)
    try:
        model, spec = convert(loaded, names, palette)
    except NotImplementedError as error:
        raise ValueError(
            f"convert: {source} is no model of mcibi_fast.models.create yet: {error}; load it in "
            "Python with mcibi_fast.compat.sssegmentation.load"
        ) from error
    write_atomically(out, pack_weights(model, spec))
    say(
        f"{out}: {spec.name} on {spec.backbone.split()[0]}, {len(names)} classes, "
        f"{sum(p.numel() for p in model.parameters()):,} weights, "
        f"{os.path.getsize(out) / 2**20:.0f} MiB"
    )
    for note in notes:
        say(note)
    if published is not None:
        short, long = published.size
        say(
            f"{published.name} as published; the authors tested it at {short} x {long} with "
            + ", ".join(f"{name}={value}" for name, value in published.inference.items())
        )


def _dilations(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,6,12,18") from None


def class_list(args: argparse.Namespace, count: int) -> tuple[list[str], list[list[int]]]:
    """Names and colours of the classes: those given, a dataset's, or class_0, class_1, ...

    Raises:
        ValueError: another number than the checkpoint's, a name twice, or no such dataset.
    """
    from mcibi_fast.data import CAMVID_CLASSES, named
    from mcibi_fast.viz.palette import distinct_palette

    if args.dataset and args.dataset != "camvid":
        dataset = named(args.dataset)
        names, palette = list(dataset.classes), dataset.palette
    else:
        if args.dataset:
            names = list(CAMVID_CLASSES)
        elif args.classes is not None:
            names = [name.strip() for name in args.classes.split(",")]
        else:
            names = [f"class_{k}" for k in range(count)]
        if "" in names or len(set(names)) < len(names):
            raise ValueError("--classes: every class needs a name of its own")
        palette = distinct_palette(len(names))
    if len(names) != count:
        given = f"{args.dataset} has" if args.dataset else "--classes names"
        raise ValueError(f"convert: the checkpoint has {count} classes, {given} {len(names)}")
    return names, palette.tolist()
