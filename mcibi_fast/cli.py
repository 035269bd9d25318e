"""``mcibi-fast``, the command line. Each command is a module of `mcibi_fast.commands`."""

from __future__ import annotations

import argparse
import atexit
import os
import select
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from mcibi_fast import extras
from mcibi_fast.allocation import keep_freed_memory
from mcibi_fast.commands import (
    Command,
    ablate,
    bench,
    convert,
    data,
    demo,
    evaluate,
    export,
    info,
    models,
    predict,
    report,
    serve,
    train,
    video,
)
from mcibi_fast.commands.options import HelpFormatter, add_command
from mcibi_fast.errors import TrainingError, WeightsError, explanation
from mcibi_fast.interrupt import signals_interrupt
from mcibi_fast.terminal import complain, show_warning

EPILOG = """\
examples:
  mcibi-fast demo
  mcibi-fast train camvid --root DATA/camvid --set optimizer.lr=0.02 epochs=50
  mcibi-fast data check ade20k DATA/ADEChallengeData2016.zip

MCIBI_FAST_DEBUG=1 in the environment shows the traceback of an error."""

COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "video": video,
    "report": report,
    "serve": serve,
    "convert": convert,
    "export": export,
    "data": data,
    "demo": demo,
    "ablate": ablate,
    "bench": bench,
    "models": models,
    "info": info,
}

# Commands that run models over and over, and then end.
STEPPING = ("train", "evaluate", "predict", "video", "demo", "ablate")


class Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their arguments; it imports nothing that takes long."""
    parser = Parser(
        prog="mcibi-fast",
        description="MCIBI++ for semantic segmentation.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        own = add_command(commands, name, command.HELP, *command.EXAMPLES)
        own.set_defaults(command=name)
        command.add_arguments(own)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 on success; 2, with one line on stderr, after invalid input or if an optional package is
        missing; 130 after Ctrl-C or SIGTERM; 141 if nobody reads the output any more.
    """
    with warnings.catch_warnings():
        # PIL warns of large images before our limit on them is an error, which says how to raise it
        warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
        warnings.showwarning = show_warning
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # the shell asks what may follow
            extras.load("completion in the shell", "argcomplete").autocomplete(parser)
        args = parser.parse_args(argv)
        command = COMMANDS[args.command]
        extras.require(f"mcibi-fast {args.command}", *extras.EXTRAS.get(command.EXTRA, ()))
        if args.command in STEPPING:
            keep_freed_memory()
        with signals_interrupt():
            return command.run(args) or 0
    except KeyboardInterrupt as stop:
        complain(str(stop) or "interrupted")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return int(128 + signal.SIGPIPE)  # after `mcibi-fast models | head`, say
        text = _text(error)
        if text is None or os.environ.get("MCIBI_FAST_DEBUG") == "1":
            raise
        complain(f"error: {text}")
        return 2


def _is_output_closed() -> bool:
    """Whether stdout is a pipe that nobody reads; then writing to it once more fails, too."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except ValueError:  # it is no file, as in a notebook
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _text(error: Exception) -> str | None:
    """What the user is told; None for what is not known, which is a bug."""
    if line := explanation(error):
        return line
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    known = (ValueError, OSError, TrainingError, WeightsError)
    return str(error) if isinstance(error, known) else None


def run() -> NoReturn:
    """Runs a command and ends the process: the program ``mcibi-fast``.

    Python would first take down the modules of PyTorch and timm one by one, looking for cycles in
    their half a million objects, which takes seconds; the system needs none for it.
    """
    status = 1  # after an exception that `main` does not expect

    def end() -> None:
        try:
            sys.stdout.flush()
        except OSError:
            os._exit(status or 120)  # as Python does
        os._exit(status)

    atexit.register(end)  # the first to be registered is the last to be called
    try:
        status = main()
    except SystemExit as stop:  # after --help
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    sys.exit(status)


if __name__ == "__main__":
    run()
