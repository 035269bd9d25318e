"""Arguments that several commands share; `run_settings` reads what they say."""

from __future__ import annotations

import argparse


def add_command(
    commands: argparse._SubParsersAction, name: str, text: str
) -> argparse.ArgumentParser:
    """A command's own parser; ``text`` is its line in the list and heads its help."""
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def add_checkpoint(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Which model; ``note`` ends its help."""
    parser.add_argument("checkpoint", help=f"a run's directory or a .safetensors file{note}")


def add_root(parser: argparse.ArgumentParser) -> None:
    """Where the data of finished runs lie now."""
    parser.add_argument("--root", metavar="DIR", help="dataset folder (default: the run's data)")


def add_inference(parser: argparse.ArgumentParser, *, large: bool = False) -> None:
    """Changes to the run's own inference settings; ``large``: large images come in windows."""
    windows = "size of sliding windows; none: the whole image at once"
    if large:
        windows += " (default: the run's, and 512,512 for more than 512x1024 pixels)"
    parser.add_argument(
        "--scales", metavar="S,...", help="scales to average over, as 0.5,1 (default: the run's)"
    )
    parser.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, help="also average over mirrored images"
    )
    parser.add_argument("--window", metavar="H,W", help=windows)
    parser.add_argument("--stride", metavar="H,W", help="stride of windows (default: 2/3 of one)")
    parser.add_argument(
        "--softmax",
        choices=["labels", "stride"],
        help="apply it at the size of the labels or of the logits",
    )
    parser.add_argument(
        "--stages", metavar="N", type=int, help="number of stages of iterative inference"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """A precision other than the run's."""
    parser.add_argument(
        "--precision",
        metavar="P",
        choices=["no", "bf16", "fp16"],
        help="no, bf16 or fp16 (default: the training's)",
    )


def add_own_size(parser: argparse.ArgumentParser) -> None:
    """Images as they are."""
    parser.add_argument(
        "--own-size", action="store_true", help="do not resize images to the run's test size"
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Whose files may be replaced."""
    parser.add_argument(
        "--overwrite", action="store_true", help="also replace files that are no predictions"
    )


def add_fold(parser: argparse.ArgumentParser) -> None:
    """The model prepared for inference."""
    parser.add_argument("--fold", action="store_true", help="fold batch norms and memory first")


def add_cpu(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Class names of a folder that lists none."""
    parser.add_argument("--classes", metavar="A,B,...", help="class names, or 'camvid'")


def add_binary(parser: argparse.ArgumentParser) -> None:
    """Masks of 0 and 255 of a folder."""
    parser.add_argument(
        "--binary", action="store_true", help="masks hold 0 and 255: make 255 class 1, not ignored"
    )


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    """Changes to a recipe's fields."""
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", nargs="+", action="extend", default=[], help=text
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Less output."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
