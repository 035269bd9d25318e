"""What labels a picture: a trained model in PyTorch, or an ONNX file in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mcibi_fast import extras
from mcibi_fast.data.base import normalise
from mcibi_fast.inference.export import METADATA
from mcibi_fast.inference.predictor import load
from mcibi_fast.models.weights import ModelSpec, find_weights, parse_spec

Pixels = NDArray[np.uint8]


class Labeller(Protocol):
    """A model that is ready.

    Attributes:
        spec: its classes and colours.
    """

    spec: ModelSpec

    def __call__(self, pixels: Pixels) -> NDArray[np.integer]:
        """Class indices (H, W) of an image (H, W, 3)."""


def open_labeller(path: str | Path, device: torch.device | str = "cpu") -> Labeller:
    """The labeller of a run, a ``.safetensors`` file, or an ``.onnx`` file of `export`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is not one of this package.
    """
    if Path(path).suffix == ".onnx":
        return OnnxLabeller(path)
    return TorchLabeller(path, device)


class TorchLabeller:
    """What `mcibi_fast.load` opens: it labels a picture as `mcibi-fast predict` does."""

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        find_weights(path)  # a path that is missing is no name on the Hub
        self._predictor = load(path, device=device)
        self.spec = self._predictor.spec

    def __call__(self, pixels: Pixels) -> NDArray[np.integer]:
        return self._predictor.predict(pixels)


class OnnxLabeller:
    """An ONNX file on the CPU; one of a fixed size gets the picture in that size."""

    def __init__(self, path: str | Path) -> None:
        onnxruntime = extras.load("mcibi-fast serve", "onnxruntime")
        if not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint: {path} does not exist")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of onnxruntime's own types
            raise ValueError(f"checkpoint: {path} is no ONNX file ({error})") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA not in metadata:
            raise ValueError(f"checkpoint: {path} was not written by `mcibi-fast export`")
        self.spec = parse_spec(metadata[METADATA], path)
        self._size = self._session.get_inputs()[0].shape[2:]

    def __call__(self, pixels: Pixels) -> NDArray[np.integer]:
        picture = Image.fromarray(pixels)
        size = picture.size
        if all(isinstance(side, int) for side in self._size):
            height, width = self._size
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        images = normalise(image, self.spec.mean, self.spec.std)[None].numpy()
        (labels,) = self._session.run(["labels"], {"images": images})
        if picture.size == size:
            return labels[0]
        found = Image.fromarray(labels[0].astype(np.int32))
        return np.array(found.resize(size, Image.Resampling.NEAREST))
