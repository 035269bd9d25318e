"""``mcibi-fast predict``."""

from __future__ import annotations

import argparse
import sys

from mcibi_fast.commands.run_settings import (
    inference_config,
    mirrored_classes,
    published_data,
    trained_config,
)
from mcibi_fast.data import DATASETS
from mcibi_fast.inference.predict import predict
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import find_weights
from mcibi_fast.recipes import NamedData, ShardsData, TrainConfig
from mcibi_fast.recipes.config import eval_transform


def run(args: argparse.Namespace) -> int:
    """Predicts an image or a folder; unreadable images are counted and named."""
    from accelerate import Accelerator

    file = find_weights(args.checkpoint)
    trained = trained_config(file)
    inference = inference_config(args, trained)
    data = _data(args.submission, trained)
    dataset = DATASETS.get(data.name) if isinstance(data, NamedData) else None
    model, spec = load_model(file)
    transform = None
    if data is not None and not args.own_size:
        transform = eval_transform(data, spec.mean, spec.std)
    result = predict(
        model,
        spec,
        args.source,
        args.out,
        inference=inference,
        transform=transform,
        flip_pairs=mirrored_classes(data) if inference.flip else (),
        submission=None if args.submission is None else dataset,
        overlays=not args.no_overlays,
        device=Accelerator(cpu=args.cpu).device,
        progress=not args.quiet,
    )
    print(f"{len(result.written)} label maps in {args.out}")
    if dataset is not None and result.submitted:
        print(f"{len(result.submitted)} for {dataset.title}'s server in {args.out}/submission")
    if not result.errors:
        return 0
    shown = "; ".join(" ".join(line.split()) for line in result.errors[:3])
    more = f"; and {len(result.errors) - 3} more" if len(result.errors) > 3 else ""
    print(f"mcibi-fast: error: {len(result.errors)} unreadable: {shown}{more}", file=sys.stderr)
    return 2


def _data(submission: str | None, trained: TrainConfig | None) -> NamedData | ShardsData | None:
    """The published dataset that gives test size, mirrored classes and ids: the run's, if any."""
    own = trained.data if trained else None
    if not isinstance(own, (NamedData, ShardsData)):
        own = None
    if submission is None:
        return own
    name = submission or (own.name if isinstance(own, NamedData) else "")
    if name not in DATASETS and not submission:
        raise ValueError("--submission: the checkpoint is of no published dataset; name one")
    return own if isinstance(own, NamedData) and own.name == name else published_data(name, trained)
