"""``mcibi-fast models``."""

from __future__ import annotations

import argparse

HELP = "list frameworks and video methods: parameters, multiply-adds"
EXTRA = "models"
EXAMPLES = ("mcibi-fast models", "mcibi-fast models --backbone resnet50 --classes 150 --size 512")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """On which backbone, and for how many classes and pixels."""
    parser.add_argument(
        "--backbone", metavar="NAME", default="resnet101", help="of timm (default: resnet101)"
    )
    parser.add_argument(
        "--classes", metavar="K", type=int, default=21, help="number of classes (default: 21)"
    )
    parser.add_argument(
        "--size", metavar="N", type=int, default=512, help="side of the image (default: 512)"
    )
    parser.add_argument(
        "--memory", metavar="M", default="mcibipp", help="mcibipp or mcibi (default: mcibipp)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints one line for each framework, by itself and with the memory, and the video methods."""
    from mcibi_fast.models.overview import overview, video_overview
    from mcibi_fast.terminal import say

    say(overview(args.classes, args.backbone, size=args.size, memory=args.memory))
    say(f"\nfor videos\n{video_overview(args.classes, args.backbone, size=args.size)}")
