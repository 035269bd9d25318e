"""``mcibi-fast report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_file, check_folder
from mcibi_fast.files import write_atomically, write_text
from mcibi_fast.terminal import say

HELP = "write a page with the pictures of one or more runs"
EXTRA = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where the page goes."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs to compare")
    options.add_root(parser)
    parser.add_argument("--images", type=int, default=6, help="how many to show (default: 6)")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first run")
    parser.add_argument("--gallery", metavar="DIR", help="also write each picture to DIR as a PNG")
    options.add_cpu(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the report, and with --gallery its pictures."""
    import torch

    from mcibi_fast.reports.runs import build_report

    if args.images < 1:
        raise ValueError(f"--images: expected at least 1, got {args.images}")
    out = Path(args.out or Path(args.runs[0]) / "report.html")
    if args.out or out.parent.is_dir():  # or else there is no run, which is said below
        check_file("--out", out, make_folder=args.out is not None)
    if args.gallery:
        check_folder("--gallery", args.gallery)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    report = build_report(
        args.runs, root=args.root, images=args.images, device=device, progress=not args.quiet
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, report.html())
    if args.gallery:
        Path(args.gallery).mkdir(parents=True, exist_ok=True)
        for name, picture in report.pictures.items():
            write_atomically(Path(args.gallery) / f"gallery_{name}.png", picture)
        say(f"{len(report.pictures)} pictures in {args.gallery}")
    say(f"report: {out.resolve()}")
