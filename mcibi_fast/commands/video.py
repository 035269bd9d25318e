"""``mcibi-fast video``."""

from __future__ import annotations

import argparse
import sys

from mcibi_fast.commands.run_settings import inference_config, mirrored_classes, trained_config
from mcibi_fast.inference.predict_video import predict_video
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import find_weights
from mcibi_fast.recipes import NamedData, ShardsData
from mcibi_fast.recipes.config import eval_transform


def run(args: argparse.Namespace) -> int:
    """Predicts a video's frames as a stream; those that cannot be used are counted."""
    from accelerate import Accelerator

    file = find_weights(args.checkpoint)
    trained = trained_config(file)
    inference = inference_config(args, trained)
    model, spec = load_model(file)
    if args.fold and not model.head.has_memory:
        raise ValueError(f"--fold: needs a model with a memory; {spec.name} has none")
    data = trained.data if trained else None
    transform = None
    if isinstance(data, (NamedData, ShardsData)) and not args.own_size:
        transform = eval_transform(data, spec.mean, spec.std)
    result = predict_video(
        model.fold() if args.fold else model,
        spec,
        args.source,
        args.out,
        overlay=not args.no_overlay,
        every=args.every,
        limit=args.limit,
        inference=inference,
        transform=transform,
        flip_pairs=mirrored_classes(data) if inference.flip else (),
        device=Accelerator(cpu=args.cpu).device,
        progress=not args.quiet,
    )
    also = f" and {result.video.name}" if result.video else ""
    print(f"{result.frames} label maps{also} in {args.out}, {result.rate:.1f} frames per second")
    if result.faults():
        print(f"mcibi-fast: warning: {result.faults()}", file=sys.stderr)
    return 0
