"""``mcibi-fast evaluate``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from mcibi_fast.data.folder import class_list
from mcibi_fast.data.shards import holds_shards
from mcibi_fast.engine.checkpoint import find_weights, load_model, read_spec
from mcibi_fast.engine.evaluate import evaluate
from mcibi_fast.engine.files import write_atomically
from mcibi_fast.engine.run import Run
from mcibi_fast.recipes import FolderData, NamedData, ScenesData, ShardsData, TrainConfig


def run(args: argparse.Namespace) -> None:
    """Prints the per-class table of a checkpoint on a split."""
    from accelerate import Accelerator

    if args.batch_size < 1 or args.workers < 0:
        raise ValueError("--batch-size must be at least 1 and --workers at least 0")
    file = find_weights(args.checkpoint)
    data = _data(file, args.root)
    dataset = data.dataset(args.split or data.val_split)
    model, spec = load_model(file, classes=dataset.classes)
    accelerator = Accelerator(cpu=args.cpu)
    confusion = evaluate(
        model.to(accelerator.device),
        dataset,
        batch_size=args.batch_size,
        workers=args.workers,
        accelerator=accelerator,
        progress=not args.quiet,
    )
    if accelerator.is_main_process:
        metrics = confusion.compute()
        print(metrics.table(spec.classes))
        if args.json:
            content = json.dumps(metrics.as_dict(spec.classes), indent=2) + "\n"
            write_atomically(Path(args.json), content.encode())


def _data(file: Path, root: str | None) -> ScenesData | FolderData | NamedData | ShardsData:
    """The data that the run was trained on, or the folder or shards given.

    The folder of a run on a published dataset holds that dataset, too.
    """
    trained = None
    for folder in file.resolve().parents[:3]:
        if trained is None and (folder / "config.json").is_file():
            trained = TrainConfig.from_dict(Run(folder).config()).data
    if root is None:
        if trained is None:
            raise ValueError(
                f"evaluate: {file} is in no run's directory; name the data with --root DIR"
            )
        return trained
    if holds_shards(root):
        return ShardsData.like(trained or FolderData(), root)
    if isinstance(trained, NamedData):
        return replace(trained, root=root)
    # A folder that lists no classes is taken to have the checkpoint's.
    listed = class_list(Path(root)) is not None
    return FolderData(root=root, classes=None if listed else read_spec(file).classes)
