"""A trained model with what it needs to label images, as `mcibi_fast.load` returns it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mcibi_fast.data.images import check_pixels, decode_pixels, picture_pixels, read_pixels
from mcibi_fast.errors import enough_memory
from mcibi_fast.inference.folding import folded_if_possible
from mcibi_fast.inference.labels import check_model
from mcibi_fast.inference.precision import precision_of
from mcibi_fast.inference.predict import LabelSettings
from mcibi_fast.inference.trained import (
    mirrored_classes,
    own_test_data,
    trained_config,
    usual_inference,
    usual_window,
)
from mcibi_fast.models import Segmentor, hub
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import ModelSpec, Precision, find_weights
from mcibi_fast.recipes import InferenceConfig, TrainConfig
from mcibi_fast.recipes.sources import eval_transform
from mcibi_fast.viz.overlay import blend

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
Labels = NDArray[np.integer]


def load(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Predictor:
    """A trained model that labels images::

        model = mcibi_fast.load("runs/scenes")
        labels = model.predict("photo.jpg")
        model.overlay("photo.jpg", labels).save("overlay.png")

    Labels are those of ``mcibi-fast predict``: with the test size, scales, windows and precision
    that the model was trained and tested with.

    Args:
        source: a run's directory (its best checkpoint), a ``.safetensors`` file, a folder that
            ``save_pretrained`` wrote, or "owner/name" on the Hugging Face Hub.
        device: by default a GPU if there is one.
        precision: "no", "bf16" or "fp16"; by default that of the training.
        revision, token, cache_dir: for the Hub, see :func:`mcibi_fast.models.hub.from_pretrained`.

    Raises:
        FileNotFoundError: there is no such folder or file, or it holds no checkpoint.
        ValueError: it is not a checkpoint of this package.
        RuntimeError: it could not be fetched from the Hub.
    """
    trained = None
    if Path(source).exists():
        file = find_weights(Path(source))
        trained = trained_config(file)
    if trained is None:
        model, spec = hub.from_pretrained(source, revision, token=token, cache_dir=cache_dir)
    else:
        model, spec = load_model(file)
        model.precision = trained.precision  # older checkpoints do not say it
    return Predictor(
        model, spec, trained=trained, device=device, precision=precision, name=str(source)
    )


class Predictor:
    """Labels images with a trained model.

    Args:
        model, spec: see `models.checkpoint.load_model`.
        trained: the configuration of the model's run, if it is known.
        device: by default a GPU if there is one.
        precision: "no", "bf16" or "fp16"; by default that of the training.
        name: of the checkpoint, for messages.

    Attributes:
        model: the network, in evaluation mode, in the form in which it is fastest: in full
            precision batch norms and memory are folded into its weights, and it cannot be trained.
        spec: its specification.
        classes: K class names.
        palette: K colours, (K, 3) uint8.
        inference: how images are taken unless ``predict`` is told otherwise.
        device: where the model is.
    """

    def __init__(
        self,
        model: Segmentor,
        spec: ModelSpec,
        *,
        trained: TrainConfig | None = None,
        device: torch.device | str | None = None,
        precision: Precision | None = None,
        name: str = "model",
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        model.precision = precision_of(model, self.device, precision)
        if model.precision == "no":  # folded weights are rounded differently in 16 bits
            model = folded_if_possible(model)
        self.model = model.to(self.device).eval()
        self.spec = spec
        self.classes = list(spec.classes)
        self.palette = np.array(spec.palette, np.uint8)
        self.inference = usual_inference(trained, spec.inference, Path(name))
        self._data = own_test_data(trained)
        self._window = usual_window(trained)

    def __repr__(self) -> str:
        return f"Predictor({self.spec.name}, {len(self.classes)} classes, {self.device})"

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        stages: int | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
        window: tuple[int, int] | Literal["none"] | None = None,
        stride: tuple[int, int] | None = None,
    ) -> Any:
        """Class indices of images, at their own sizes.

        Args:
            images: a path, the content of an image file, a PIL image, or an array of colours
                (H, W, 3) or grey values (H, W) in uint8; or a list of these, which may differ in
                size. EXIF's orientation is applied. An array (B, H, W, 3) is a list.
            stages: number of stages of iterative inference; by default the model's own.
            scales: factors on the image's sides; predictions for each are averaged.
            flip: whether predictions for the mirrored image are averaged in.
            window: (height, width) of sliding windows; "none" takes large images whole, too.
            stride: (down, right) from one window to the next, by default two thirds of one.

        Returns:
            (H, W) uint8 (int64 for more than 256 classes), or a list of these.

        Raises:
            DataError: an image cannot be read; the message names it.
            TypeError: something that is no image.
            ValueError: options that make no sense, or that the model cannot follow.
            TooLittleMemoryError: naming the image.
        """
        changes: dict[str, Any] = {"stages": stages, "flip": flip, "stride": stride}
        changes["scales"] = None if scales is None else tuple(scales)
        changes = {name: value for name, value in changes.items() if value is not None}
        if window is not None:
            changes |= {"window": None if window == "none" else window}
            changes.setdefault("stride", None)
        settings = self._settings(replace(self.inference, **changes), window == "none")
        several = isinstance(images, (list, tuple)) or _is_batch(images)
        listed: Any = images if several else [images]
        names = [_name(image, i if several else None) for i, image in enumerate(listed)]
        found = [
            settings.label(pixels_of(image, name), name)[0]
            for image, name in zip(listed, names, strict=True)
        ]
        return found if several else found[0]

    def overlay(
        self, image: ImageLike, labels: Labels | None = None, *, alpha: float = 0.55
    ) -> Image.Image:
        """The image with its classes in colour on top.

        Args:
            image: as in ``predict``.
            labels: (H, W) what ``predict`` returned for it; by default it is predicted.
            alpha: opacity of the colours.

        Raises:
            ValueError: the labels have another size than the image.
        """
        pixels = pixels_of(image, _name(image))
        if labels is None:
            labels = self.predict(pixels)
        return Image.fromarray(blend(pixels, labels, self.palette, alpha))

    def _settings(self, inference: InferenceConfig, whole: bool) -> LabelSettings:
        check_model(self.model, inference)
        transform = None
        if self._data is not None:
            transform = eval_transform(self._data, self.spec.mean, self.spec.std)
        return LabelSettings(
            self.model,
            self.spec,
            inference,
            self.device,
            transform,
            mirrored_classes(self._data) if inference.flip else (),
            None if whole else self._window,
        )


def pixels_of(image: ImageLike, name: str) -> NDArray[np.uint8]:
    """The colours (H, W, 3) uint8 of what `Predictor.predict` takes as one image.

    Args:
        image: a path, a file's content, a PIL image or an array.
        name: the name that errors use.

    Raises:
        DataError, TypeError: see `Predictor.predict`.
    """
    with enough_memory(name, "make the image smaller"):
        if isinstance(image, (str, os.PathLike)):
            return read_pixels(Path(image))
        if isinstance(image, (bytes, bytearray, memoryview)):
            return decode_pixels(bytes(image), name)
        if isinstance(image, Image.Image):
            return picture_pixels(image, name)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
            if image.ndim == 2:
                image = np.repeat(image[..., None], 3, axis=2)
            if image.ndim == 3 and image.shape[2] == 3:
                check_pixels(image.shape[1], image.shape[0], name)
                return np.ascontiguousarray(image)
    what = type(image).__name__
    if isinstance(image, np.ndarray):
        what = f"an array {image.shape} of {image.dtype}"
    raise TypeError(
        f"{name}: expected a path, an image file's content, a PIL image or an array (H, W, 3) or "
        f"(H, W) of uint8, got {what}"
    )


def _is_batch(images: Any) -> bool:
    return isinstance(images, np.ndarray) and images.ndim == 4


def _name(image: Any, number: int | None = None) -> str:
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return "image" if number is None else f"image {number}"
