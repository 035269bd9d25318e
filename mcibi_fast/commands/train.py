"""``mcibi-fast train``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcibi_fast import recipes
from mcibi_fast.data.shards import holds_shards, is_remote
from mcibi_fast.engine.run import Run
from mcibi_fast.recipes import NamedData, ScenesData, ShardsData, TrainConfig

# Any framework on any backbone, with and without a memory.
FREE_RECIPES = {
    "camvid": recipes.camvid,
    "folder": recipes.folder,
    "ade20k": recipes.ade20k,
    "lip": recipes.lip,
    "cihp": recipes.cihp,
    "cityscapes": recipes.cityscapes,
    "cityscapes_trainval": recipes.cityscapes_trainval,
    "coco_stuff": recipes.coco_stuff,
    "pascal_context": recipes.pascal_context,
    "voc": recipes.voc,
    "vspw": recipes.vspw,
    "camvid_video": recipes.camvid_video,
}
RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": recipes.demo,
    "scenes": recipes.scenes,
    "moving_scenes": recipes.moving_scenes,
    **FREE_RECIPES,
}


def run(args: argparse.Namespace) -> None:
    """Trains by a recipe, or goes on with a run."""
    if args.resume:
        if args.recipe or args.set or args.root or args.out or _model_choices(args):
            raise ValueError("--resume goes on with the run's own settings; give nothing else")
        config = TrainConfig.from_dict(Run(args.resume).config())
        out = Path(args.resume)
    else:
        config = configure(args.recipe, args.root, args.set, **_model_choices(args))
        out = Path(args.out or f"runs/{args.recipe}")
    if args.show:
        print(json.dumps(config.to_dict(), indent=2))
        return

    from mcibi_fast.engine.state import seed_global_generators
    from mcibi_fast.engine.train import train

    # Each process its own dropout; the weights of the first are broadcast.
    rank = int(os.environ.get("RANK", "0"))
    seed_global_generators(config.seed + rank)
    result = train(config, out, resume=bool(args.resume), progress=not args.quiet)
    if rank == 0:
        print(
            f"{result.steps} steps, {result.seconds:.0f} s; best mIoU "
            f"{100 * (result.best['mean_iou'] or 0):.2f}; {result.out}"
        )
        _write_report(config, result.out, progress=not args.quiet)


def _write_report(config: TrainConfig, out: Path, *, progress: bool) -> None:
    """Writes report.html; where that fails one line says so, for the run itself is whole."""
    file = out / "report.html"
    try:
        import torch

        from mcibi_fast.commands.report import build_report
        from mcibi_fast.engine.files import write_atomically

        use_gpu = config.device != "cpu" and torch.cuda.is_available()
        report = build_report([out], device="cuda" if use_gpu else "cpu", progress=progress)
        write_atomically(file, report.html().encode())
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        print(f"mcibi-fast: warning: {file} not written: {why}", file=sys.stderr)
    else:
        print(f"report: {file}")


def _model_choices(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a recipe that were given."""
    given = {"framework": args.framework, "backbone": args.backbone}
    choices: dict[str, Any] = {name: value for name, value in given.items() if value}
    return choices | ({"memory": False} if args.without_memory else {})


def configure(
    recipe: str | None, root: str | None, settings: list[str], **model: Any
) -> TrainConfig:
    """A recipe's configuration with the command line's changes.

    Args:
        recipe: a key of `RECIPES`.
        root: the dataset's folder or zip file.
        settings: see `recipes.apply_settings`.
        model: ``framework``, ``backbone`` and ``memory`` of a recipe that takes them.

    Raises:
        ValueError: no such recipe or field, or a value that does not fit.
    """
    if recipe not in RECIPES:
        named = f"no recipe {recipe!r}" if recipe else "which recipe"
        raise ValueError(f"train: {named}; there are {', '.join(RECIPES)} (or --resume DIR)")
    if model and recipe not in FREE_RECIPES:
        option = next(iter(model)).replace("memory", "without-memory")
        raise ValueError(
            f"--{option}: the recipe {recipe} has a model of its own; change it with "
            "--set model.name=... model.backbone=..."
        )
    config = FREE_RECIPES[recipe](**model) if model else RECIPES[recipe]()
    if root is not None:
        if isinstance(config.data, ScenesData):
            raise ValueError(f"--root: the recipe {recipe} reads no folder")
        if holds_shards(root):
            config.data = ShardsData.like(config.data, root)
        # A published dataset may also be its zip file.
        elif not (
            Path(root).is_dir() or (isinstance(config.data, NamedData) and Path(root).exists())
        ):
            raise FileNotFoundError(f"--root: {root} is not a folder")
        config.data.root = root if is_remote(root) else str(Path(root).resolve())
    recipes.apply_settings(config, settings)
    config.validate()
    return config
