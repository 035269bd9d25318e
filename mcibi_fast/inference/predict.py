"""Images to label maps and overlays on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mcibi_fast.data.base import normalise
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import IMAGE_SUFFIXES, read_pixels
from mcibi_fast.files import make_folder, new_file
from mcibi_fast.inference.labels import FlipPairs, check_model, predict_labels
from mcibi_fast.inference.precision import autocast, precision_of
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import ModelSpec, Precision
from mcibi_fast.recipes.parts import InferenceConfig
from mcibi_fast.viz.overlay import blend, indexed

if TYPE_CHECKING:
    from mcibi_fast.data import Transform
    from mcibi_fast.data.listed import ListedDataset


@dataclass
class PredictResult:
    """What `predict` did.

    Attributes:
        written: label maps, in order.
        submitted: the same for a test server, where that was asked for.
        errors: one line per image that could not be read, naming it.
    """

    written: list[Path] = field(default_factory=list)
    submitted: list[Path] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def find_images(source: str | Path) -> list[Path]:
    """The image itself, or all images under a folder, sorted.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: a folder without images.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"source: {source} does not exist")
    if not source.is_dir():
        return [source]
    images = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"source: {source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


@torch.no_grad()
def predict(
    model: Segmentor,
    spec: ModelSpec,
    source: str | Path,
    out: str | Path,
    *,
    inference: InferenceConfig | None = None,
    transform: Transform | None = None,
    flip_pairs: FlipPairs = (),
    submission: type[ListedDataset] | None = None,
    overlays: bool = True,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> PredictResult:
    """Predicts every image; label maps have its own size.

    Writes ``out/labels/NAME.png`` (palette PNG whose values are the class indices) and
    ``out/overlays/NAME.png``; below a source folder, names keep their subfolders. For a test server
    it also writes ``out/submission/NAME.png``, whose grey values are the dataset's own ids, all in
    one folder under the images' names. An image that cannot be read is left out and noted in the
    result.

    Args:
        model: a model from `checkpoint.load_model`, as is ``spec``; put into evaluation mode.
        spec: normalisation and palette.
        source: an image or a folder.
        out: folder for the results, created if needed.
        inference: the default is one pass over the whole image.
        transform: transforms the image before the network, such as a dataset's `EvalTransform`; by
            default it is normalised and keeps its size.
        flip_pairs: classes that a mirrored image swaps.
        submission: the dataset whose test server the files are for.
        overlays: also write overlays.
        device: by default the model's device.
        precision: "no", "bf16" or "fp16"; by default that of the model's training.
        progress: show a bar.

    Raises:
        FileNotFoundError, ValueError: see `find_images`.
        ValueError: ``inference`` makes no sense or is not for this model; ``submission`` has other
            classes than the model, or two images have one name.
        OSError: an output cannot be written.
    """
    source, out = Path(source), Path(out)
    device = torch.device(device if device is not None else next(model.parameters()).device)
    model.to(device).eval()
    palette = np.array(spec.palette, np.uint8)
    result = PredictResult()
    images = find_images(source)
    inference = inference or InferenceConfig()
    check_model(model, inference)
    if submission is not None:
        _check_submission(submission, spec, images)
    names = _output_names(images, source if source.is_dir() else source.parent)
    bar = tqdm(images, desc="predict", unit="image", disable=None if progress else True)
    for path, name in zip(bar, names, strict=True):
        try:
            pixels = read_pixels(path)
        except DataError as error:
            result.errors.append(str(error))
            continue
        image = _network_input(pixels, spec, transform)[None].to(device)
        size = (pixels.shape[0], pixels.shape[1])
        with autocast(device, precision_of(model, device, precision)):
            labels = predict_labels(model, image, size, inference, flip_pairs=flip_pairs)
        label = labels[0].cpu().numpy()
        target = out / "labels" / name
        save_picture(indexed(label, palette), target, below=out)
        result.written.append(target)
        if submission is not None:
            target = out / "submission" / f"{path.stem}.png"
            save_picture(Image.fromarray(submission.to_submission(label)), target, below=out)
            result.submitted.append(target)
        if overlays:
            overlay = Image.fromarray(blend(pixels, label, palette))
            save_picture(overlay, out / "overlays" / name, below=out)
    return result


def _network_input(pixels: np.ndarray, spec: ModelSpec, transform: Transform | None) -> Tensor:
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if transform is None:
        return normalise(image, spec.mean, spec.std)
    return transform(image, image[0], epoch=0, index=0)[0]  # no label: any will do


def _check_submission(dataset: type[ListedDataset], spec: ModelSpec, images: list[Path]) -> None:
    if len(dataset.classes) != len(spec.classes):
        raise ValueError(
            f"submission: {dataset.title} has {len(dataset.classes)} classes, the model has "
            f"{len(spec.classes)}"
        )
    stem, count = Counter(path.stem for path in images).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"submission: {count} images are called {stem}; a server needs different names"
        )


def _output_names(images: list[Path], root: Path) -> list[Path]:
    """``a.jpg`` becomes ``a.png``, or ``a.jpg.png`` if two images would become ``a.png``."""
    relative = [path.relative_to(root) for path in images]
    counts = Counter(path.with_suffix("") for path in relative)
    return [
        path.with_name(path.name + ".png")
        if counts[path.with_suffix("")] > 1
        else path.with_suffix(".png")
        for path in relative
    ]


def save_picture(image: Image.Image, path: Path, *, below: Path) -> None:
    """Writes a PNG whole or not at all; links in its way are replaced, see `make_folder`."""
    make_folder(path.parent, below=below)
    with new_file(path, sync=False) as file:
        image.save(file, "PNG")
