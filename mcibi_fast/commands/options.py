"""Arguments that several commands share; `run_settings` reads what they say."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mcibi_fast.protocols import PROTOCOLS, TEST_PROTOCOLS


class HelpFormatter(argparse.HelpFormatter):
    """Help that fits a screen: short usage, examples as they are written, one ``...`` for more."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "max_help_position": 26})

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        """Without the options, which are listed below it."""
        actions = list(actions)
        if usage is None:
            named = [a for a in actions if a.option_strings and a.help != argparse.SUPPRESS]
            words = [self._format_args(a, a.dest) for a in actions if not a.option_strings]
            usage = " ".join(["%(prog)s", *["[options]"] * bool(named), *words])
        super().add_usage(usage, actions, groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        """Leaves room for the names of commands, which are indented."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length = max(
                self._action_max_length, 4 + max(map(len, action.choices))
            )

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+" and not isinstance(action.metavar, tuple):
            return f"{action.metavar or default_metavar} ..."
        return super()._format_args(action, default_metavar)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_command(
    commands: argparse._SubParsersAction, name: str, text: str, *examples: str
) -> argparse.ArgumentParser:
    """A command's own parser.

    Args:
        commands: what it is added to.
        name: the command.
        text: its line in the list, which also heads its help.
        examples: whole command lines, which end its help.
    """
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser._positionals.title = parser._optionals.title = None  # the usage tells them apart
    return parser


def add_checkpoint(parser: argparse.ArgumentParser, note: str = "", *, above: bool = False) -> None:
    """Which model; ``note`` ends its help, which is ``above`` the list of a command with many."""
    text = f"a run's directory or a .safetensors file{note}"
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=argparse.SUPPRESS if above else text
    )
    if above:
        parser.description = str(parser.description).replace("checkpoint", f"checkpoint ({text})")


def add_root(parser: argparse.ArgumentParser) -> None:
    """Where the data of finished runs lie now."""
    parser.add_argument("--root", metavar="DIR", help="dataset folder (default: the run's data)")


def add_inference(
    parser: argparse.ArgumentParser, *, large: bool = False, scores: bool = False
) -> None:
    """Changes to the run's own inference settings.

    Args:
        parser: the command's.
        large: large images come in windows.
        scores: videos are scored, so ``--protocol`` also names how.
    """
    windows = "size of windows; none: the whole image at once"
    if large:
        windows = "of windows, or none (default: the run's, else by size)"
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
        metavar="WHERE",
        choices=["labels", "stride", "none"],
        help="at labels or stride; none averages the logits",
    )
    parser.add_argument(
        "--stages", metavar="N", type=int, help="number of stages of iterative inference"
    )
    parser.add_argument(
        "--threshold", metavar="T", type=float, help="probability for class 1 of two (0.5)"
    )
    text = "own or released"
    if scores:
        text += f"; to score videos: {' or '.join(PROTOCOLS)}"
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        action="append",
        default=[],
        choices=[*TEST_PROTOCOLS, *(PROTOCOLS if scores else ())],
        help=text,
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
    """Whether batch norms and memory are folded into the weights; see `run_settings.prepared`."""
    parser.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="fold norms and memory (default: if possible)",
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """The model compiled before it runs."""
    parser.add_argument(
        "--compile", action="store_true", help="compile the model first, with torch.compile"
    )


def add_cpu(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Class names of a folder that lists none."""
    parser.add_argument("--classes", metavar="A,B,...", help="class names, or 'camvid'")


def add_masks(parser: argparse.ArgumentParser, *, of_run: bool = False) -> None:
    """Masks of 0 and 255, or of 1..K, of a folder.

    With ``of_run`` the run says it unless one of the options does, which can then also say no; they
    are one line in a help with many.
    """
    if of_run:
        yes_or_no = argparse.BooleanOptionalAction
        binary = "255 is class 1; --[no-]reduce-labels: 0 is ignored"
        parser.add_argument("--binary", action=yes_or_no, help=binary)
        parser.add_argument("--reduce-labels", action=yes_or_no, help=argparse.SUPPRESS)
        return
    binary = "masks hold 0 and 255: make 255 class 1, not ignored"
    reduced = "masks hold 1..K: ignore 0, lower the others by one"
    parser.add_argument("--binary", action="store_true", help=binary)
    parser.add_argument("--reduce-labels", action="store_true", help=reduced)


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    """Changes to a recipe's fields."""
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", nargs="+", action="extend", default=[], help=text
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Less output."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")
