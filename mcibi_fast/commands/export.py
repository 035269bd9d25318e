"""``mcibi-fast export``: a checkpoint as an ONNX file or a ``torch.export`` program."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mcibi_fast.data.base import normalise
from mcibi_fast.data.images import decode
from mcibi_fast.inference import export
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import ModelSpec

_LONGEST = 512  # side of an image to compare on: PyTorch's attention is quadratic in its pixels


def run(args: argparse.Namespace) -> None:
    """Writes the file and says what was compared."""
    out = Path(args.out)
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"export: the result is a .onnx or a .pt2 file, not {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {out.parent}")
    if out.suffix == ".onnx":
        export.check_onnx()
    if args.stages is not None and args.stages < 1:
        raise ValueError(f"--stages: expected at least 1, got {args.stages}")
    size = parse_size(args.size)
    model, spec = load_model(args.checkpoint)
    image = None if args.check is None else read_image(Path(args.check), spec, size)
    agreements = export.save(
        model, spec, out, size=size, stages=args.stages, fold=not args.no_fold, image=image
    )
    kind = f"ONNX, opset {export.OPSET}" if out.suffix == ".onnx" else "torch.export program"
    sizes = "images of any size" if size is None else "images of {}x{}".format(*size)
    print(
        f"{out}: {kind}, {spec.name} on {spec.backbone.split()[0]}, "
        f"{'not folded' if args.no_fold else 'folded'}, batches of any size, {sizes}, "
        f"{os.path.getsize(out) / 2**20:.1f} MiB"
    )
    for n, agreement in enumerate(agreements):
        what = args.check if n == 0 and args.check else "random numbers"
        print(
            f"  {what}, {'x'.join(map(str, agreement.shape))}: logits within "
            f"{agreement.error:.1e} of float64, by the largest (PyTorch {agreement.own_error:.1e}, "
            f"allowed {agreement.bound:.1e}); {agreement.mistaken} of {agreement.pixels} pixels "
            "of another class"
        )


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "512,1024" -> (512, 1024).

    Raises:
        ValueError: not two positive whole numbers.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*", text):
        raise ValueError(f"--size: expected H,W such as 512,1024, got {text!r}")
    height, width = map(int, text.split(","))
    return height, width


def read_image(path: Path, spec: ModelSpec, size: tuple[int, int] | None) -> Tensor:
    """(1, 3, H, W) as the model expects it: of the fixed size, or of at most 512 pixels a side."""
    picture = decode(path).convert("RGB")
    if size is None:
        picture.thumbnail((_LONGEST, _LONGEST))
    else:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return normalise(pixels, spec.mean, spec.std)[None]
