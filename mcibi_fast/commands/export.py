"""``mcibi-fast export``: a checkpoint as an ONNX file or a ``torch.export`` program."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mcibi_fast import extras
from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_file
from mcibi_fast.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from mcibi_fast.models.weights import ModelSpec

HELP = "make an ONNX or torch.export file of a checkpoint"
EXTRA = "train"
EXAMPLES = (
    "mcibi-fast export runs/first model.onnx",
    "mcibi-fast export runs/first model.pt2 --size 512,512 --stages 2",
)

_LONGEST = 512  # side of an image to compare on: PyTorch's attention is quadratic in its pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, into which file, and what is compared."""
    options.add_checkpoint(parser)
    parser.add_argument("out", help="the .onnx or .pt2 file to write")
    parser.add_argument(
        "--size", metavar="H,W", help="accept images of this size only (default: any)"
    )
    parser.add_argument(
        "--stages", type=int, metavar="N", help="number of stages of iterative inference"
    )
    parser.add_argument(
        "--no-fold", action="store_true", help="do not fold batch norms and projections"
    )
    parser.add_argument(
        "--check",
        metavar="IMAGE",
        help="compare the outputs on this image, too (default: on random numbers)",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the file and says what was compared."""
    from mcibi_fast.inference import export
    from mcibi_fast.models.checkpoint import load_model
    from mcibi_fast.models.weights import find_weights

    out = Path(args.out)
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"export: the result is a .onnx or a .pt2 file, not {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {out.parent}")
    check_file("export", out, inputs=[find_weights(args.checkpoint)])
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
    say(
        f"{out}: {kind}, {spec.name} on {spec.backbone.split()[0]}, "
        f"{'not folded' if args.no_fold else 'folded'}, full precision, batches of any size, "
        f"{sizes}, {os.path.getsize(out) / 2**20:.1f} MiB"
    )
    for n, agreement in enumerate(agreements):
        what = args.check if n == 0 and args.check else "random numbers"
        say(
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
    import numpy as np
    import torch

    from mcibi_fast.data.base import normalise
    from mcibi_fast.data.images import read_pixels
    from mcibi_fast.data.notes import Notes

    image = extras.load("mcibi-fast export", "PIL.Image")
    picture = image.fromarray(read_pixels(path, notes=Notes()))
    if size is None:
        picture.thumbnail((_LONGEST, _LONGEST))
    else:
        picture = picture.resize(size[::-1], image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return normalise(pixels, spec.mean, spec.std)[None]
