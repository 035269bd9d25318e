"""Cross-image style mixing: takes the amplitudes of low frequencies from another image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcibi_fast.data.base import SegmentationDataset
from mcibi_fast.data.resizing import resize_image


def mix_amplitude(image: NDArray[Any], other: NDArray[Any], *, band: float) -> NDArray[np.floating]:
    """The image with the other's Fourier amplitudes at low frequencies; all phases are kept.

    Colours and lighting change, shapes stay where they are. This is FDA (arXiv 2004.05498, Eqs.
    1-3), with the style taken from another image of the same dataset.

    Args:
        image, other: (3, H, W), the same size.
        band: b; amplitudes are taken within ``floor(b * min(H, W))`` cycles per image, in either
            direction. At 0 that is the mean colour alone.

    Returns:
        (3, H, W), not clipped.
    """
    height, width = image.shape[-2:]
    reach = int(band * min(height, width))
    spectrum, style = np.fft.rfft2(image), np.fft.rfft2(other)
    rows = np.abs(np.fft.fftfreq(height, 1 / height)) <= reach + 0.5
    columns = np.arange(spectrum.shape[-1]) <= reach
    low = rows[:, None] & columns
    amplitude = np.where(low, np.abs(style), np.abs(spectrum))
    return np.fft.irfft2(amplitude * np.exp(1j * np.angle(spectrum)), s=(height, width))


class StyleMixing:
    """With some probability, gives a training image the style of another image of its split.

    The draws depend on (seed, epoch, index) and do not change those of `TrainTransform`.

    Args:
        dataset: dataset of the other images, which are read again (with their masks).
        probability: in 0..1.
        band: in 0..0.5, see `mix_amplitude`; FDA's authors use 0.01, 0.05 and 0.09.
        seed: of the draws.

    Called with an image (3, H, W) uint8 and keywords ``epoch`` and ``index``; returns an image of
    the same kind.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self, dataset: SegmentationDataset, *, probability: float, band: float = 0.01, seed: int = 0
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"style_mixing: {probability} is no probability in 0..1")
        if not 0 <= band <= 0.5:
            raise ValueError(f"style_band: {band} is not in 0..0.5")
        if len(dataset) < 2:
            raise ValueError(f"style_mixing: needs two images or more, there is {len(dataset)}")
        self.dataset, self.probability, self.band, self.seed = dataset, probability, band, seed

    def __call__(self, image: Tensor, *, epoch: int, index: int) -> Tensor:
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        if rng.random() >= self.probability:
            return image
        other = int(rng.integers(len(self.dataset) - 1))
        other += other >= index  # any but the image itself
        style = _at_size(self.dataset.read(other)[0], image.shape[-2:])
        mixed = mix_amplitude(image.numpy(), style, band=self.band)
        return torch.from_numpy(np.rint(np.clip(mixed, 0, 255)).astype(np.uint8))


def _at_size(pixels: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """(H, W, 3) -> (3, h, w)."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return resize_image(image, size).numpy()
