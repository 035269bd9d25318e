"""``mcibi-fast report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_file, check_folder
from mcibi_fast.files import write_atomically, write_text
from mcibi_fast.terminal import say

HELP = "write a page about runs, or an index of a folder of runs"
EXTRA = "report"
EXAMPLES = (
    "mcibi-fast report runs/first runs/second --out compared.html",
    "mcibi-fast report runs",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where the page goes."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directories of runs to compare, or one of runs"
    )
    options.add_root(parser)
    parser.add_argument("--images", type=int, default=6, help="how many to show (default: 6)")
    parser.add_argument(
        "--out", metavar="FILE", help="default: report.html, index.html of an index"
    )
    parser.add_argument("--gallery", metavar="DIR", help="also write each picture to DIR as a PNG")
    options.add_cpu(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the report, and with --gallery its pictures."""
    import torch

    from mcibi_fast.reports.runs import build_report

    alone = len(args.runs) == 1 and not (Path(args.runs[0]) / "config.json").exists()
    if alone and _write_index(args):
        return
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


def _write_index(args: argparse.Namespace) -> bool:
    """Writes the index of a folder of runs; False if there are none in it."""
    from mcibi_fast.reports.index import build_index, find_runs

    folder = Path(args.runs[0])
    if not folder.is_dir() or not find_runs(folder):
        return False
    if args.gallery or args.root:
        raise ValueError(f"report: {folder} is a folder of runs; its index takes only --out")
    out = Path(args.out or folder / "index.html")
    check_file("--out", out, make_folder=args.out is not None)
    page = build_index(folder).html()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    say(f"index: {out.resolve()}")
    return True
