"""``mcibi-fast bench``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import mcibi_fast
from mcibi_fast.commands.outputs import check_folder

_PREFIX = "bench_"
# What "all" leaves out, and its module.
_OTHERS = {
    "table6": "table6_stages",
    "table7": "table7_contexts",
    "table15": "table15_methods",
    "sweep": "sweep",
    "plot": "plots",
}

HELP = "run the benchmarks, or plot their results"
EXTRA = ""
EXAMPLES = ("mcibi-fast bench", "mcibi-fast bench upsample_argmax --quick")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which benchmark, and what it is given."""
    parser.add_argument("name", nargs="?", help="a benchmark, all, or plot (default: list them)")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="for the benchmark, such as --quick"
    )


def run(args: argparse.Namespace) -> int:
    """Lists the benchmarks of the checkout, runs one or all of them, or draws their results.

    Returns:
        the first exit status that is not 0.
    """
    root = Path(mcibi_fast.__file__).parents[1]
    names = sorted(p.stem[len(_PREFIX) :] for p in (root / "benchmarks").glob(f"{_PREFIX}*.py"))
    if not names:
        raise ValueError(
            "bench: the benchmarks come with the source, not with the package; clone the "
            "repository and run `mcibi-fast bench` from an installation of the checkout "
            "(pip install -e .)"
        )
    modules = {name: f"{_PREFIX}{name}" for name in names} | _OTHERS
    if args.name is None:
        print("\n".join([*names, "all", *_OTHERS]))
        return 0
    if args.name not in (*modules, "all"):
        raise ValueError(f"bench: no benchmark {args.name!r}; there are {', '.join(modules)}, all")
    arguments = list(args.arguments)
    if "--out" in arguments[:-1]:  # the benchmarks run in the checkout
        at = arguments.index("--out") + 1
        arguments[at] = str(check_folder("--out", arguments[at]).resolve())
    for name in names if args.name == "all" else [args.name]:
        command = [sys.executable, "-m", f"benchmarks.{modules[name]}", *arguments]
        status = subprocess.run(command, cwd=root, check=False).returncode
        if status:
            return status
    return 0
