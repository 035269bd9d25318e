"""``mcibi-fast predict``."""

from __future__ import annotations

import argparse
import sys

from mcibi_fast.engine.checkpoint import load_model
from mcibi_fast.engine.predict import predict


def run(args: argparse.Namespace) -> int:
    """Predicts an image or a folder; unreadable images are counted and named."""
    from accelerate import Accelerator

    model, spec = load_model(args.checkpoint)
    result = predict(
        model,
        spec,
        args.source,
        args.out,
        overlays=not args.no_overlays,
        device=Accelerator(cpu=args.cpu).device,
        progress=not args.quiet,
    )
    print(f"{len(result.written)} label maps in {args.out}")
    if not result.errors:
        return 0
    shown = "; ".join(" ".join(line.split()) for line in result.errors[:3])
    more = f"; and {len(result.errors) - 3} more" if len(result.errors) > 3 else ""
    print(f"mcibi-fast: error: {len(result.errors)} unreadable: {shown}{more}", file=sys.stderr)
    return 2
