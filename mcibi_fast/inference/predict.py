"""Images to label maps and overlays on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import IMAGE_SUFFIXES, read_pixels
from mcibi_fast.data.listing import distinct_names, list_images
from mcibi_fast.data.notes import Notes
from mcibi_fast.defaults import LARGE_WINDOW
from mcibi_fast.errors import enough_memory
from mcibi_fast.inference.labels import (
    LESS_MEMORY,
    FlipPairs,
    check_model,
    predict_labels,
    windows_for_large,
)
from mcibi_fast.inference.outputs import check_targets, save_picture, short_name, writer_of
from mcibi_fast.inference.pictures import input_size, network_input
from mcibi_fast.inference.precision import autocast, precision_of
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import ModelSpec, Precision
from mcibi_fast.progress import track
from mcibi_fast.recipes.parts import InferenceConfig
from mcibi_fast.terminal import warn
from mcibi_fast.viz.overlay import blend, indexed

if TYPE_CHECKING:
    from mcibi_fast.data import Transform
    from mcibi_fast.data.listed import ListedDataset


MOST_CLASSES = 256  # of a label map of eight bits


@dataclass(frozen=True)
class LabelSettings:
    """A model and how it labels an image.

    Attributes:
        model, spec, inference, device, transform, flip_pairs, large_window, precision: see
            `predict`; ``inference`` was checked (`labels.check_model`).
    """

    model: Segmentor
    spec: ModelSpec
    inference: InferenceConfig
    device: torch.device
    transform: Transform | None = None
    flip_pairs: FlipPairs = ()
    large_window: tuple[int, int] | None = LARGE_WINDOW
    precision: Precision | None = None

    @torch.no_grad()
    def label(self, pixels: NDArray[np.uint8], name: str) -> tuple[NDArray[np.integer], bool]:
        """Class indices (H, W) of an image (H, W, 3), and whether it was taken in windows.

        The indices are uint8, or int64 if there are too many classes.

        Raises:
            TooLittleMemoryError: naming the image.
        """
        spec, inference = self.spec, self.inference
        image = network_input(
            pixels, spec.mean, spec.std, self.transform, self.device, inference.protocol
        )
        if self.large_window is not None:
            inference = windows_for_large(inference, input_size(image), self.large_window)
        height, width = pixels.shape[:2]
        used = precision_of(self.model, self.device, self.precision)
        with (
            enough_memory(f"{name}: {width}x{height} pixels", LESS_MEMORY),
            autocast(self.device, used),
        ):
            labels = predict_labels(
                self.model,
                image,
                (height, width),
                inference,
                flip_pairs=self.flip_pairs,
                dtype=torch.uint8 if len(spec.classes) <= MOST_CLASSES else torch.int64,
            )
            return labels[0].cpu().numpy(), inference != self.inference


@dataclass
class PredictResult:
    """What `predict` did.

    Attributes:
        written: label maps, in order.
        submitted: the same for a test server, where that was asked for.
        errors: one line per image that could not be read, naming it.
        in_windows: number of images that were taken in windows because they are large.
        left_out: number of files below the source that an earlier `predict` wrote.
    """

    written: list[Path] = field(default_factory=list)
    submitted: list[Path] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    in_windows: int = 0
    left_out: int = 0


def find_images(source: str | Path) -> list[Path]:
    """The image itself, or all images under a folder (see `data.listing`), sorted.

    A `DataWarning` says which files that can be seen are left out.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: a folder without images.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"source: {source} does not exist")
    if not source.is_dir():
        return [source]
    found = list_images(source)
    left_out = found.describe(hidden=False)
    if not found.paths:
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        more = f"; left out {left_out}" if left_out else ""
        raise ValueError(f"source: {source} holds no images ({expected}){more}")
    if left_out:
        warn(f"{source}: left out {left_out}")
    return [source / path for path in found.paths]


class _Job(NamedTuple):
    """An image and where its results go."""

    image: Path
    label: Path
    overlay: Path | None
    submitted: Path | None

    def targets(self) -> list[Path]:
        return [path for path in self[1:] if path is not None]


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
    large_window: tuple[int, int] | None = LARGE_WINDOW,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> PredictResult:
    """Predicts every image; label maps have its own size.

    Writes ``out/labels/NAME.png`` (palette PNG whose values are the class indices) and
    ``out/overlays/NAME.png``; below a source folder, names keep their subfolders. For a test server
    it also writes ``out/submission/NAME.png``, whose grey values are the dataset's own ids, all in
    one folder under the images' names. An image that cannot be read is left out and noted in the
    result, and so are pictures in the source folder that an earlier call wrote (they carry a mark).

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
        large_window: if ``inference`` has no windows, large images are taken in windows of this
            (height, width), see `labels.windows_for_large`; None takes them whole.
        overwrite: also replace files that no earlier call wrote; inputs never are.
        device: by default the model's device.
        precision: "no", "bf16" or "fp16"; by default that of the model's training.
        progress: show how far it is.

    Raises:
        FileNotFoundError, ValueError: see `find_images`.
        ValueError: ``inference`` makes no sense or is not for this model; ``submission`` has other
            classes than the model, or two images have one name; an output would replace an input or
            a file that no earlier call wrote; there are more classes than a label map can hold.
        TooLittleMemoryError: naming the image.
        OSError: an output cannot be written.
    """
    source, out = Path(source), Path(out)
    device = torch.device(device if device is not None else next(model.parameters()).device)
    model.to(device).eval()
    palette = np.array(spec.palette, np.uint8)
    notes = Notes()
    if len(palette) > MOST_CLASSES:
        raise ValueError(
            f"predict: a label map holds up to {MOST_CLASSES} classes, the model has {len(palette)}"
        )
    inference = inference or InferenceConfig()
    check_model(model, inference)
    settings = LabelSettings(
        model, spec, inference, device, transform, flip_pairs, large_window, precision
    )
    images, left_out = _inputs(source)
    result = PredictResult(left_out=left_out)
    if submission is not None:
        _check_submission(submission, spec, images)
    root = source if source.is_dir() else source.parent
    names = [name.with_name(short_name(name.name)) for name in _output_names(images, root)]
    jobs = [
        _Job(
            path,
            out / "labels" / name,
            out / "overlays" / name if overlays else None,
            out / "submission" / short_name(f"{path.stem}.png") if submission else None,
        )
        for path, name in zip(images, names, strict=True)
    ]
    check_targets((t for job in jobs for t in job.targets()), images, overwrite=overwrite)
    for job in track(jobs, "predict", unit="image", show=progress, leave=True):
        try:
            with enough_memory(str(job.image), "make the image smaller"):
                pixels = read_pixels(job.image, notes=notes)
        except DataError as error:
            result.errors.append(str(error))
            continue
        label, in_windows = settings.label(pixels, str(job.image))
        result.in_windows += in_windows
        with enough_memory(str(job.image), LESS_MEMORY):
            save_picture(indexed(label, palette), job.label, below=out)
            result.written.append(job.label)
            if submission is not None and job.submitted is not None:
                picture = Image.fromarray(submission.to_submission(label))
                save_picture(picture, job.submitted, below=out)
                result.submitted.append(job.submitted)
            if job.overlay is not None:
                picture = Image.fromarray(blend(pixels, label, palette, out=pixels))
                save_picture(picture, job.overlay, below=out)
    return result


def _inputs(source: Path) -> tuple[list[Path], int]:
    """The images of `find_images`, without those that `predict` wrote, and the number of these.

    An image that is named itself is taken in any case.
    """
    images = find_images(source)
    if not source.is_dir():
        return images, 0
    own = {path for path in images if writer_of(path)}
    if len(own) == len(images):
        raise ValueError(f"source: {source} holds only pictures that mcibi-fast wrote")
    return [path for path in images if path not in own], len(own)


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
    relative = [path.relative_to(root).as_posix() for path in images]
    return [Path(f"{name}.png") for name in distinct_names(relative)]
