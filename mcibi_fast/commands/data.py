"""``mcibi-fast data check``."""

from __future__ import annotations

import argparse
import sys

from mcibi_fast.data import CAMVID_CLASSES, check


def run(args: argparse.Namespace) -> int:
    """Reads a dataset folder and reports what is in it and what is wrong with it."""
    classes = None
    if args.classes:
        names = [name.strip() for name in args.classes.split(",")]
        classes = CAMVID_CLASSES if names == ["camvid"] else names
    report = check(
        args.root,
        args.out or "data_check",
        classes=classes,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    print(report.text())
    if report.ok:
        return 0
    first = " ".join(report.problems[0].split())
    more = f" (and {len(report.problems) - 1} more above)" if len(report.problems) > 1 else ""
    print(f"mcibi-fast: error: {first}{more}", file=sys.stderr)
    return 2
