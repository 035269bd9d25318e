"""``mcibi-fast data check``, ``data convert`` and ``data pack``."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_folder
from mcibi_fast.terminal import complain, say

if TYPE_CHECKING:
    from mcibi_fast.data import Report, SegmentationDataset
    from mcibi_fast.recipes import CocoData, HuggingFaceData

HELP = "check, convert and pack datasets"
EXTRA = "train"
EXAMPLES = ("mcibi-fast data check folder DATA", "mcibi-fast data pack folder DATA SHARDS")
_FORMAT = "fields of coco or huggingface data, such as label=mask"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An action, which has arguments of its own."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_check(actions)
    _add_convert(actions)
    _add_pack(actions)


def _add_check(actions: argparse._SubParsersAction) -> None:
    parser = options.add_command(
        actions,
        "check",
        "read a dataset and report what is wrong with it",
        "mcibi-fast data check folder DATA",
        "mcibi-fast data check ade20k DATA/ADEChallengeData2016.zip",
    )
    parser.usage = "%(prog)s [options] [NAME] ROOT"
    parser.set_defaults(action=_check)
    parser.add_argument(
        "dataset",
        nargs="+",
        metavar="[NAME] ROOT",
        help="ROOT alone (or after 'folder') holds images/SPLIT and labels/SPLIT; a published "
        "dataset by its name (ade20k, lip, cihp, cityscapes, coco_stuff, pascal_context, voc, "
        "vspw, camvid), also zipped; coco (its JSON); huggingface (save_to_disk's folder)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for four overlays (default: data_check)"
    )
    options.add_classes(parser)
    options.add_masks(parser)
    options.add_set(parser, _FORMAT)
    options.add_quiet(parser)


def _add_convert(actions: argparse._SubParsersAction) -> None:
    parser = options.add_command(
        actions,
        "convert",
        "make PASCAL-Context's masks from its annotations",
        "mcibi-fast data convert pascal_context DATA/VOC2010",
        "mcibi-fast data convert pascal_context DATA --annotations trainval_merged.json",
    )
    parser.set_defaults(action=_convert)
    parser.add_argument("name", choices=["pascal_context"], help="the dataset")
    parser.add_argument("root", help="VOC2010, or the folder that holds it")
    parser.add_argument("--annotations", metavar="FILE", help="trainval_merged.json")
    options.add_quiet(parser)


def _add_pack(actions: argparse._SubParsersAction) -> None:
    parser = options.add_command(
        actions,
        "pack",
        "write a dataset into tar shards, for `train --root OUT`",
        "mcibi-fast data pack folder DATA SHARDS",
        "mcibi-fast data pack camvid DATA/camvid SHARDS --split train --shard-size 64",
    )
    parser.usage = "%(prog)s [options] [NAME] ROOT OUT"
    parser.set_defaults(action=_pack)
    parser.add_argument(
        "dataset",
        nargs="+",
        metavar="[NAME] ROOT OUT",
        help="a folder, or a published dataset by its name, as for check; shards go to OUT/SPLIT",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        action="extend",
        metavar="SPLIT",
        help="splits to pack (default: train val)",
    )
    parser.add_argument("--shard-size", type=int, default=256, metavar="MB", help="default: 256")
    options.add_classes(parser)
    options.add_masks(parser)
    options.add_set(parser, _FORMAT)
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes that read, at most one for each core (default: 2)",
    )
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Reports what is in a dataset and what is wrong with it, makes masks for one, or packs it."""
    return args.action(args, progress=not args.quiet)


def _convert(args: argparse.Namespace, progress: bool) -> int:
    from mcibi_fast.data.pascal_context import convert

    sizes = convert(args.root, args.annotations, progress=progress)
    say("masks    " + ", ".join(f"{split} {count}" for split, count in sizes.items()))
    return 0


def _pack(args: argparse.Namespace, progress: bool) -> int:
    from mcibi_fast.data import pack
    from mcibi_fast.data.packing import check_free

    if len(args.dataset) not in (2, 3):
        raise ValueError(f"data pack: expected [NAME] ROOT OUT, got {' '.join(args.dataset)}")
    if args.shard_size < 1 or args.workers < 0:
        raise ValueError("--shard-size must be at least 1 and --workers at least 0")
    *source, out = args.dataset
    check_folder("data pack", out)
    splits = args.split or _usual_splits(source, args)
    for split in splits:
        check_free(out, split)
    for split in splits:
        done = pack(
            _open(source, split, args),
            out,
            split,
            shard_bytes=args.shard_size * 1_000_000,
            workers=args.workers,
            progress=progress,
        )
        say(
            f"{done.path}  {done.samples:,} images, {done.shards} shard{'s' * (done.shards > 1)}, "
            f"{done.bytes / 1e6:,.0f} MB"
        )
    return 0


def _usual_splits(source: list[str], args: argparse.Namespace) -> list[str]:
    data = _of_format(_dataset_name(source[:-1], args), source[-1], args)
    return ["train", "val"] if data is None else [data.train_split, data.val_split]


def _of_format(name: str, root: str, args: argparse.Namespace) -> CocoData | HuggingFaceData | None:
    """Data in the format of another toolbox, with what ``--set`` says; None for others."""
    from mcibi_fast.recipes import apply_settings
    from mcibi_fast.recipes.sources import FORMATS

    if name not in FORMATS:
        if args.set:
            raise ValueError(f"--set: for {' and '.join(FORMATS)}, whose data have fields")
        return None
    data = FORMATS[name](root=root)
    apply_settings(data, [*args.set, *(["reduce_labels=true"] if args.reduce_labels else [])])
    return data


def _open(source: list[str], split: str, args: argparse.Namespace) -> SegmentationDataset:
    """The split of ROOT, or of NAME ROOT."""
    from mcibi_fast.data import FolderDataset, named

    name = _dataset_name(source[:-1], args)
    if name in ("folder", "camvid"):
        classes = _class_names("camvid" if name == "camvid" else args.classes)
        return FolderDataset(
            source[-1],
            split,
            classes=classes,
            binary=args.binary,
            reduce_labels=args.reduce_labels,
        )
    data = _of_format(name, source[-1], args)
    return named(name)(source[-1], split) if data is None else data.dataset(split)


def _dataset_name(name: list[str], args: argparse.Namespace) -> str:
    """The dataset's name, "folder" if it has none; refuses options that are not for it."""
    if name in ([], ["folder"]):
        return "folder"
    own = args.reduce_labels and name != ["huggingface"]  # whose data have that field
    given = {"classes": args.classes, "binary": args.binary, "reduce-labels": own}
    _refuse(given, "a published dataset has its own; give ROOT alone")
    return name[0]


def _refuse(options: dict[str, object], why: str) -> None:
    """Raises if one of these options is given."""
    for option, given in options.items():
        if given:
            raise ValueError(f"--{option}: {why}")


def _class_names(text: str | None) -> list[str] | None:
    """What ``--classes`` says."""
    from mcibi_fast.data import CAMVID_CLASSES

    if not text:
        return None
    names = [name.strip() for name in text.split(",")]
    return CAMVID_CLASSES if names == ["camvid"] else names


def _check(args: argparse.Namespace, progress: bool) -> int:
    out = check_folder("--out", args.out or "data_check")
    report = _checked(args, str(out), progress)
    say(report.text())
    if report.ok:
        return 0
    more = f" (and {len(report.problems) - 1} more above)" if len(report.problems) > 1 else ""
    complain(f"error: {report.problems[0]}{more}")
    return 2


def _checked(args: argparse.Namespace, out: str, progress: bool) -> Report:
    from mcibi_fast.data import (
        CAMVID_CLASSES,
        DataError,
        check,
        check_named,
        check_shards,
        check_splits,
    )
    from mcibi_fast.data.folder import CAMVID_SIZES
    from mcibi_fast.data.shards import packed_folders

    *given, root = args.dataset
    if len(given) > 1:
        raise ValueError(f"data check: expected [NAME] ROOT, got {' '.join(args.dataset)}")
    name = _dataset_name(given, args)
    if name == "camvid":
        sizes = CAMVID_SIZES
        return check(root, out, classes=CAMVID_CLASSES, sizes=sizes, videos=True, progress=progress)
    data = _of_format(name, root, args)
    if data is not None:
        splits = data.splits()
        if not splits:
            raise DataError(f"{root}: no splits in it that are {name} data")
        return check_splits(
            root, {split: partial(data.dataset, split) for split in splits}, out, "", progress
        )
    if name != "folder":
        return check_named(name, root, out, progress=progress)
    if packed_folders(root):
        given = {"classes": args.classes, "binary": args.binary}
        given["reduce-labels"] = args.reduce_labels
        why = "packed with their classes; pack the data again with it"
        _refuse(given, f"{root} holds shards, {why}")
        return check_shards(root, out, progress=progress)
    return check(
        root,
        out,
        classes=_class_names(args.classes),
        binary=args.binary,
        reduce_labels=args.reduce_labels,
        progress=progress,
    )
