"""``mcibi-fast train``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_folder
from mcibi_fast.terminal import complain, say

if TYPE_CHECKING:
    from mcibi_fast.recipes import AugmentationConfig, TrainConfig

HELP = "train a model and evaluate it"
EXTRA = "train"
EXAMPLES = (
    "mcibi-fast train demo --out runs/first --set epochs=5",
    "mcibi-fast train folder --root DATA --framework pspnet --out runs/mine",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which recipe, data and model; or which run to continue."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="demo, scenes, folder, coco, huggingface, ade20k, ...",
    )
    parser.add_argument("--root", metavar="DIR", help="the dataset's folder, zip file or shards")
    parser.add_argument(
        "--framework", metavar="NAME", help="fcn, pspnet, ... (`mcibi-fast models` lists all)"
    )
    parser.add_argument("--backbone", metavar="NAME", help="a model of timm, such as resnet101")
    parser.add_argument("--memory", metavar="NAME", help="mcibipp (the default), mcibi, or none")
    parser.add_argument("--without-memory", action="store_true", help="the same as --memory none")
    parser.add_argument(
        "--from", dest="start", metavar="RUN", help="fine-tune the model of a run or weights file"
    )
    parser.add_argument("--out", metavar="DIR", help="the run's directory (default: runs/RECIPE)")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR")
    parser.add_argument(
        "--config", metavar="FILE", help="TOML with fields of the recipe; --set comes after it"
    )
    options.add_set(parser, "change any field of the recipe, such as optimizer.lr=0.02")
    parser.add_argument(
        "--augmentation", metavar="CODE", help="a function or albumentations pipeline, MODULE:NAME"
    )
    parser.add_argument("--show", action="store_true", help="print all fields and stop")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    """Trains by a recipe, or continues a run."""
    from mcibi_fast.recipes.registry import configure
    from mcibi_fast.recipes.sources import relocated
    from mcibi_fast.training.run import Run

    if args.resume:
        given = (args.recipe, args.set, args.out, args.config, args.start, _model_choices(args))
        if any(given):
            raise ValueError(
                "--resume goes on with the run's own settings; give nothing else but --root and "
                "--augmentation"
            )
        config = Run(args.resume).settings()
        if args.root:
            config.data = relocated(config.data, args.root)
        if args.augmentation:
            config.augmentation = _consented(config.augmentation, args.augmentation)
        out = Path(args.resume)
    else:
        config = configure(
            args.recipe,
            args.root,
            args.set,
            file=args.config,
            start=args.start,
            needs_root=not args.show,
            **_model_choices(args),
        )
        if args.augmentation:
            config.augmentation.function = args.augmentation
        name = args.recipe or Path(args.config).stem
        out = check_folder("--out", args.out or f"runs/{name}")
    if args.show:
        say(json.dumps(config.to_dict(), indent=2))
        return

    from mcibi_fast.training.state import seed_global_generators
    from mcibi_fast.training.train import train

    # Each process its own dropout; the weights of the first are broadcast.
    rank = int(os.environ.get("RANK", "0"))
    seed_global_generators(config.seed + rank)
    result = train(config, out, resume=bool(args.resume), progress=not args.quiet)
    if rank == 0:
        say(
            f"{result.steps} steps, {result.seconds:.0f} s; best mIoU "
            f"{100 * (result.best['mean_iou'] or 0):.2f}; {result.out}"
        )
        _write_report(config, result.out, progress=not args.quiet)


def _consented(stored: AugmentationConfig, function: str) -> AugmentationConfig:
    """The run's augmentation, whose function the user names again and so allows to import."""
    from mcibi_fast.recipes import AugmentationConfig

    if function != stored.function:
        raise ValueError(f"--augmentation {function}: the run began with {stored.function}")
    return AugmentationConfig(**vars(stored))


def _write_report(config: TrainConfig, out: Path, *, progress: bool) -> None:
    """Writes report.html; where that fails one line says so, for the run itself is whole."""
    file = out / "report.html"
    try:
        import torch

        from mcibi_fast.files import write_text
        from mcibi_fast.reports.runs import build_report

        use_gpu = config.device != "cpu" and torch.cuda.is_available()
        report = build_report([out], device="cuda" if use_gpu else "cpu", progress=progress)
        write_text(file, report.html())
    except Exception as error:
        complain(f"warning: {file} not written: {str(error) or type(error).__name__}")
    else:
        say(f"report: {file}")


def _model_choices(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a recipe that were given."""
    names = ("framework", "backbone", "memory")
    choices: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.without_memory or args.memory == "none":
        choices["memory"] = None
    return choices
