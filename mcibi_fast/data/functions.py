"""Augmentation by a user's function or an albumentations pipeline."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcibi_fast.data.base import IGNORE_INDEX, normalise_in_place
from mcibi_fast.untrusted import shorten

Augmentation = Callable[..., Any]
"""``(image, label, rng) -> (image, label)``, or a transform or pipeline of albumentations.

``image`` (H, W, 3) uint8, ``label`` (H, W) of an integer dtype with ``ignore_index`` for pixels
without a class, ``rng`` a ``numpy.random.Generator``.
"""


class FunctionTransform:
    """A user's augmentation in place of `TrainTransform`'s; then normalisation and padding.

    Everything random must come from ``rng``, which is seeded by (seed, epoch, sample index), so
    that augmentation is the same for any number of workers and in a resumed run. A function that
    draws from a global generator is refused. A transform of albumentations has generators of its
    own, which are seeded from ``rng`` before each call.

    Args:
        function: see `Augmentation`. A clip comes as (T, H, W, 3); albumentations transforms its
            frames alike (its target ``images``).
        crop_size: (height, width) of what comes out. A smaller result is padded at the right and
            the bottom as in `TrainTransform`; a larger one is refused.
        mean, std: the dataset's, three each, for colours in 0..1.
        seed: of the augmentation.
        ignore_index: label of padding.
        num_classes: labels must be below it, or ``ignore_index``; None does not check them.
        name: begins error messages.

    Called as `TrainTransform`. Raises ValueError, naming the function, for a result that is not an
    image and a label as described, and for a global generator that was used.
    """

    def __init__(
        self,
        function: Augmentation,
        crop_size: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        num_classes: int | None = None,
        name: str = "augmentation",
    ) -> None:
        self.function, self.crop_size = function, crop_size
        self.mean, self.std, self.seed = tuple(mean), tuple(std), seed
        self.ignore_index, self.num_classes, self.name = ignore_index, num_classes, name
        if not callable(function):
            raise ValueError(f"{name}: expected a function or a pipeline, got {type(function)}")

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, epoch, index, 3))
        pixels = np.ascontiguousarray(image.movedim(-3, -1).numpy())
        result = self._called(pixels, label.numpy().copy(), rng)
        colours, classes = self._checked(result, pixels, label.numpy())
        height, width = classes.shape
        padded = torch.zeros(*image.shape[:-2], *self.crop_size)
        crop = torch.from_numpy(colours).movedim(-1, -3).float()
        padded[..., :height, :width] = normalise_in_place(crop, self.mean, self.std)
        padded_label = label.new_full(self.crop_size, self.ignore_index)
        padded_label[:height, :width] = torch.from_numpy(classes)
        return padded, padded_label

    def _called(
        self, image: NDArray[np.uint8], label: NDArray[np.integer], rng: np.random.Generator
    ) -> Any:
        before = _global_states()
        if is_albumentations(self.function):
            self.function.set_random_seed(int(rng.integers(2**32)))  # type: ignore[attr-defined]
            frames = "image" if image.ndim == 3 else "images"
            named = self.function(**{frames: image}, mask=label)
            result: Any = (named[frames], named["mask"])
        else:
            result = self.function(image, label, rng)
        for name, was, now in zip(_GENERATORS, before, _global_states(), strict=True):
            if was != now:
                raise ValueError(
                    f"{self.name}: draws from the global generator of {name}, so that a resumed "
                    "run would differ; draw from the generator that it is given"
                )
        return result

    def _checked(
        self, result: Any, image: NDArray[np.uint8], label: NDArray[np.integer]
    ) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """The result, if it is an image and a label of one size that fit the crop."""
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(
                f"{self.name}: expected (image, label), got {shorten(type(result).__name__)}"
            )
        pixels, classes = result
        for what, given, own in (("image", pixels, image), ("label", classes, label)):
            if not isinstance(given, np.ndarray):
                raise ValueError(
                    f"{self.name}: the {what} is a {type(given).__name__}, not a numpy array "
                    "(leave out conversions to tensors: they come afterwards)"
                )
            if given.dtype != own.dtype:
                raise ValueError(
                    f"{self.name}: the {what} has become {given.dtype}, expected {own.dtype} "
                    "(leave out normalisation: it comes afterwards)"
                )
            if given.ndim != own.ndim:
                raise ValueError(
                    f"{self.name}: the {what} has shape {given.shape}; it came as {own.shape}"
                )
        if pixels.shape[:-3] != image.shape[:-3] or pixels.shape[-1] != 3:
            raise ValueError(
                f"{self.name}: the image has shape {pixels.shape}; it came as {image.shape}"
            )
        height, width = classes.shape
        if pixels.shape[-3:-1] != (height, width):
            raise ValueError(
                f"{self.name}: the image is {pixels.shape[-3]}x{pixels.shape[-2]}, its label "
                f"{height}x{width}"
            )
        if height > self.crop_size[0] or width > self.crop_size[1]:
            raise ValueError(
                f"{self.name}: gives {height}x{width}, more than augmentation.crop_size "
                f"{self.crop_size[0]}x{self.crop_size[1]}; end it with a crop of that size"
            )
        self._check_labels(classes)
        return np.ascontiguousarray(pixels), np.ascontiguousarray(classes)

    def _check_labels(self, classes: NDArray[np.integer]) -> None:
        if self.num_classes is None:
            return
        bad = ((classes < 0) | (classes >= self.num_classes)) & (classes != self.ignore_index)
        if bad.any():
            raise ValueError(
                f"{self.name}: makes label {classes[bad][0]} with {self.num_classes} classes; "
                f"masks are interpolated by nearest, and filled with a class or {self.ignore_index}"
            )


_GENERATORS = ("random", "numpy.random", "torch")


def _global_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 - the one that others use
    return (
        hash(random.getstate()),
        (numpy_state["pos"], numpy_state["key"].tobytes()),
        torch.get_rng_state().numpy().tobytes(),
    )


def is_albumentations(function: object) -> bool:
    """Whether it is a transform or a pipeline of albumentations, which is not imported for this."""
    module = sys.modules.get("albumentations")
    if module is None:
        return False
    return isinstance(function, (module.BasicTransform, module.BaseCompose))


def load_function(path: str) -> Augmentation:
    """What an import path such as "package.module:name" names.

    The module is installed, or in the present folder.

    Raises:
        ValueError: not such a path, no such module or name, an error while it is imported, or
            nothing that can be called.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise ValueError(f"{path}: expected MODULE:NAME, such as my_augmentation:pipeline")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # also for the processes that load data; installed modules come first
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ValueError(f"{path}: {shorten(error)}") from error
    except Exception as error:  # the module may raise anything
        raise ValueError(
            f"{path}: {module_name} cannot be imported ({type(error).__name__}: {shorten(error)})"
        ) from error
    if not callable(found):
        raise ValueError(f"{path}: is a {type(found).__name__}, which cannot be called")
    return found
