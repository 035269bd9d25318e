"""``mcibi-fast ablate``: trains the rows of one of the paper's tables and compares."""

from __future__ import annotations

import argparse

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_folder

HELP = "train the rows of one of the paper's tables and compare"
EXTRA = "train"
EXAMPLES = ("mcibi-fast ablate", "mcibi-fast ablate 4 --seeds 3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which table, on which data, and how often."""
    parser.add_argument("table", nargs="?", help="its number, such as 2 (default: list the tables)")
    parser.add_argument(
        "--data", help="camvid, ade20k, ... (default: scenes, for video tables moving_scenes)"
    )
    parser.add_argument("--root", metavar="DIR", help="the dataset's folder, or its zip file")
    parser.add_argument("--test-root", metavar="DIR", help="table 8: the folder of CIHP")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the runs, which tables share (default: runs/ablate/DATA); finished runs "
        "are kept",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per row (default: 1)")
    parser.add_argument("--rows", metavar="A,B", help="rows by name or number (default: all)")
    options.add_set(parser, "change a field of the recipe, for all rows")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    """Trains what is not trained yet, writes results after each row, prints the table."""
    from mcibi_fast.ablations.ablation import list_tables, prepare, tell

    if args.table is None:
        tell(list_tables())
        return
    if args.out is not None:
        check_folder("--out", args.out)
    ablation = prepare(
        args.table,
        data=args.data,
        root=args.root,
        test_root=args.test_root,
        out=args.out,
        seeds=args.seeds,
        rows=args.rows,
        settings=args.set,
        progress=not args.quiet,
    )
    tell(ablation.announcement())
    for _ in ablation.carry_out():
        ablation.write()
    tell(f"\n{ablation.report()}\n\nresults: {ablation.folder.resolve()}")
