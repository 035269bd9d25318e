"""``mcibi-fast data check``, ``data convert`` and ``data pack``."""

from __future__ import annotations

import argparse
import sys

from mcibi_fast.data import (
    CAMVID_CLASSES,
    FolderDataset,
    Report,
    SegmentationDataset,
    check,
    check_named,
    check_shards,
    named,
    pack,
)
from mcibi_fast.data.folder import CAMVID_SIZES
from mcibi_fast.data.pascal_context import convert
from mcibi_fast.data.shards import local_splits


def run(args: argparse.Namespace) -> int:
    """Reports what is in a dataset and what is wrong with it, makes masks for one, or packs it."""
    progress = not args.quiet and sys.stderr.isatty()
    if args.action == "convert":
        sizes = convert(args.root, args.annotations, progress=progress)
        print("masks    " + ", ".join(f"{split} {count}" for split, count in sizes.items()))
        return 0
    if args.action == "pack":
        _pack(args, progress)
        return 0
    return _report(_check(args, progress))


def _pack(args: argparse.Namespace, progress: bool) -> None:
    if len(args.dataset) not in (2, 3):
        raise ValueError(f"data pack: expected [NAME] ROOT OUT, got {' '.join(args.dataset)}")
    if args.shard_size < 1 or args.workers < 0:
        raise ValueError("--shard-size must be at least 1 and --workers at least 0")
    *source, out = args.dataset
    for split in args.split or ["train", "val"]:
        done = pack(
            _open(source, split, args.classes),
            out,
            split,
            shard_bytes=args.shard_size * 1_000_000,
            workers=args.workers,
            progress=progress,
        )
        print(
            f"{done.path}  {done.samples:,} images, {done.shards} shard{'s' * (done.shards > 1)}, "
            f"{done.bytes / 1e6:,.0f} MB"
        )


def _open(source: list[str], split: str, classes: str | None) -> SegmentationDataset:
    """The split of ROOT, or of NAME ROOT."""
    if len(source) == 1 or source[0] == "camvid":
        names = CAMVID_CLASSES if len(source) == 2 else _class_names(classes)
        return FolderDataset(source[-1], split, classes=names)
    if classes:
        raise ValueError("--classes: a published dataset has its own; give ROOT alone")
    return named(source[0])(source[1], split)


def _class_names(text: str | None) -> list[str] | None:
    """What ``--classes`` says."""
    if not text:
        return None
    names = [name.strip() for name in text.split(",")]
    return CAMVID_CLASSES if names == ["camvid"] else names


def _check(args: argparse.Namespace, progress: bool) -> Report:
    out = args.out or "data_check"
    if len(args.dataset) > 2:
        raise ValueError(f"data check: expected [NAME] ROOT, got {' '.join(args.dataset)}")
    if len(args.dataset) == 2:
        if args.classes:
            raise ValueError("--classes: a published dataset has its own; give ROOT alone")
        name, root = args.dataset
        if name == "camvid":
            return check(
                root,
                out,
                classes=CAMVID_CLASSES,
                sizes=CAMVID_SIZES,
                videos=True,
                progress=progress,
            )
        return check_named(name, root, out, progress=progress)
    root = args.dataset[0]
    if local_splits(root):
        return check_shards(root, out, progress=progress)
    return check(root, out, classes=_class_names(args.classes), progress=progress)


def _report(report: Report) -> int:
    print(report.text())
    if report.ok:
        return 0
    first = " ".join(report.problems[0].split())
    more = f" (and {len(report.problems) - 1} more above)" if len(report.problems) > 1 else ""
    print(f"mcibi-fast: error: {first}{more}", file=sys.stderr)
    return 2
