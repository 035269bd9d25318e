"""``mcibi-fast data check`` and ``mcibi-fast data convert``."""

from __future__ import annotations

import argparse
import sys

from mcibi_fast.data import CAMVID_CLASSES, Report, check, check_named
from mcibi_fast.data.folder import CAMVID_SIZES
from mcibi_fast.data.pascal_context import convert


def run(args: argparse.Namespace) -> int:
    """Reports what is in a dataset and what is wrong with it, or makes masks for one."""
    progress = not args.quiet and sys.stderr.isatty()
    if args.action == "convert":
        sizes = convert(args.root, args.annotations, progress=progress)
        print("masks    " + ", ".join(f"{split} {count}" for split, count in sizes.items()))
        return 0
    return _report(_check(args, progress))


def _check(args: argparse.Namespace, progress: bool) -> Report:
    out = args.out or "data_check"
    if len(args.dataset) > 2:
        raise ValueError(f"data check: expected [NAME] ROOT, got {' '.join(args.dataset)}")
    if len(args.dataset) == 2:
        if args.classes:
            raise ValueError("--classes: a published dataset has its own; give ROOT alone")
        name, root = args.dataset
        if name == "camvid":
            return check(root, out, classes=CAMVID_CLASSES, sizes=CAMVID_SIZES, progress=progress)
        return check_named(name, root, out, progress=progress)
    classes = None
    if args.classes:
        names = [name.strip() for name in args.classes.split(",")]
        classes = CAMVID_CLASSES if names == ["camvid"] else names
    return check(args.dataset[0], out, classes=classes, progress=progress)


def _report(report: Report) -> int:
    print(report.text())
    if report.ok:
        return 0
    first = " ".join(report.problems[0].split())
    more = f" (and {len(report.problems) - 1} more above)" if len(report.problems) > 1 else ""
    print(f"mcibi-fast: error: {first}{more}", file=sys.stderr)
    return 2
