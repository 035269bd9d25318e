"""The options that the benchmarks' command lines share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.results import RESULTS


def parser_of(description: str, threads: int | None = None) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes: ``--device``, ``--threads`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    usual = "PyTorch's" if threads is None else threads
    parser.add_argument(
        "--threads", type=int, default=threads, help=f"CPU threads (default: {usual})"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for CSV and JSON")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, after checking and setting those of ``parser_of``."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads: must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    return options
