"""Parts of a training configuration: optimiser, losses, augmentation, adversarial images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mcibi_fast.data import SegmentationDataset, TrainTransform


@dataclass
class OptimizerConfig:
    """Optimiser and poly schedule.

    Attributes:
        name: "sgd" or "adamw".
        lr: initial learning rate.
        momentum: of SGD.
        weight_decay: L2 for SGD, decoupled for AdamW.
        power: exponent of the poly schedule.
        floor: final learning rate as a share of the initial: 0 in the paper, 0.01 in the released
            code.
        clip_norm: largest total norm of the gradient; None leaves it alone.
        backbone_lr: factor on the backbone's learning rate.
        layer_decay: one more, for each block of the backbone from its end to the block; 1 is none.
        decay_norms: weight decay also for norms, biases and tables of positions.
        warmup_steps: optimizer steps of the linear warm-up, times which the schedule goes; 0 none.
        warmup_start: the warm-up's factor at the first step.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    floor: float = 0.0
    clip_norm: float | None = None
    backbone_lr: float = 1.0
    layer_decay: float = 1.0
    decay_norms: bool = True
    warmup_steps: int = 0
    warmup_start: float = 1e-6

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense."""
        check_range("optimizer.lr", self.lr, "a positive number", above=0)
        check_range("optimizer.backbone_lr", self.backbone_lr, "0 or more", least=0)
        check_range(
            "optimizer.layer_decay", self.layer_decay, "above 0, at most 1", above=0, most=1
        )
        check_range("optimizer.warmup_steps", self.warmup_steps, "0 or more", least=0)
        check_range("optimizer.warmup_start", self.warmup_start, "0 to 1", least=0, most=1)


@dataclass
class AugmentationConfig:
    """Arguments of `mcibi_fast.data.TrainTransform`.

    Attributes:
        crop_size: (height, width).
        scale: range of the random scale.
        short_side, long_side, size: what the scale multiplies; without any, the image's own size.
        max_class_share: largest share of one class in a crop.
        rotation: largest angle in degrees, either way.
        rotation_probability: of a rotation.
        style_mixing: probability that a crop takes another image's style, see
            `mcibi_fast.data.StyleMixing`.
        style_band: of the frequencies whose amplitude it takes.
    """

    crop_size: tuple[int, int] = (512, 512)
    scale: tuple[float, float] = (0.5, 2.0)
    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None
    max_class_share: float = 0.75
    rotation: float = 0.0
    rotation_probability: float = 0.5
    style_mixing: float = 0.0
    style_band: float = 0.01

    def transform(self, dataset: SegmentationDataset, seed: int) -> TrainTransform:
        """The transform of a training split; its draws are seeded by ``seed``.

        Raises:
            ValueError: a field out of range.
        """
        from mcibi_fast.data import StyleMixing, TrainTransform

        options = asdict(self)
        probability, band = options.pop("style_mixing"), options.pop("style_band")
        style = None
        if probability != 0:
            style = StyleMixing(dataset, probability=probability, band=band, seed=seed)
        return TrainTransform(
            mean=dataset.mean,
            std=dataset.std,
            seed=seed,
            ignore_index=dataset.ignore_index,
            flip_pairs=dataset.flip_pairs,
            style=style,
            **options,
        )


@dataclass
class LossConfig:
    """Arguments of `mcibi_fast.nn.PixelLoss`, the loss of every head.

    Attributes:
        label_smoothing: share of the target spread over all classes.
        class_weights: one number per class, or "balanced": ``a / ln(1.02 + p_c)`` with p_c the
            class's share of the train split's labelled pixels and ``a`` such that the weights'
            mean over these pixels is 1. A run's config.json holds the numbers.
        ohem_threshold: only pixels whose right class has a probability below this count.
        ohem_min_kept: but at least this many per process and micro-batch.
    """

    label_smoothing: float = 0.0
    class_weights: list[float] | Literal["balanced"] | None = None
    ohem_threshold: float | None = None
    ohem_min_kept: int = 100_000

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense."""
        smoothing = self.label_smoothing
        check_range("loss.label_smoothing", smoothing, "0 to 1, not 1", least=0, below=1)
        if self.ohem_threshold is not None:
            threshold = self.ohem_threshold
            check_range("loss.ohem_threshold", threshold, "above 0, at most 1", above=0, most=1)
        check_range("loss.ohem_min_kept", self.ohem_min_kept, "at least 1", least=1)
        for weight in self.class_weights if isinstance(self.class_weights, list) else []:
            check_range("loss.class_weights", weight, "0 or more", least=0)


@dataclass
class AdversarialConfig:
    """Adversarial images in training, see `mcibi_fast.training.adversarial`.

    Attributes:
        probability: of a step with such images instead of the plain ones; 0 is off.
        epsilon: largest change of a colour in 0..255.
    """

    probability: float = 0.0
    epsilon: float = 2.0

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense."""
        check_range("adversarial.probability", self.probability, "0 to 1", least=0, most=1)
        check_range("adversarial.epsilon", self.epsilon, "0 or more, of 255", least=0)


def check_range(
    name: str,
    value: float,
    expected: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raises ValueError, naming the field, unless ``least <= value <= most`` and so on."""
    if not (least <= value <= most and above < value < below):  # nor NaN nor infinite
        raise ValueError(f"{name}: expected {expected}, got {value}")


@dataclass(frozen=True)
class InferenceConfig:
    """How a model is tested: views of an image, averaged. See `mcibi_fast.inference.labels`.

    Attributes:
        scales: factors of the test image's sides, one view each.
        flip: each view mirrored, too.
        window: (height, width) of sliding windows; None takes a view as a whole.
        stride: (down, right) from one window to the next; None is two thirds of the window, such
            as 341 of 512.
        softmax: where probabilities are formed: at the "labels" size, or at the network's "stride"
            (``use_probs_before_resize`` of the released code, on in its MCIBI++ configurations with
            sliding windows).
        stages: of iterative inference (section 3.5); None leaves it to the model.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    softmax: Literal["labels", "stride"] = "labels"
    stages: int | None = None

    @property
    def is_single_view(self) -> bool:
        """One pass over the whole image."""
        return len(self.scales) == 1 and not self.flip and self.window is None

    def validate(self) -> None:
        """Raises ValueError, naming the field, for settings that make no sense."""
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"inference.scales: expected positive numbers, got {self.scales}")
        if self.softmax not in ("labels", "stride"):
            raise ValueError(f"inference.softmax: expected labels or stride, got {self.softmax}")
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"inference.stages: expected at least 1, got {self.stages}")
        if self.window is None:
            if self.stride is not None:
                raise ValueError("inference.stride: is that of sliding windows; give window, too")
            return
        for name, sides in (("window", self.window), ("stride", self.window_stride)):
            if min(sides) < 1:
                raise ValueError(f"inference.{name}: expected positive sides, got {sides}")
        if any(s > w for s, w in zip(self.window_stride, self.window, strict=True)):
            raise ValueError(
                f"inference.stride: {self.window_stride} is more than the window {self.window}: "
                "pixels between two windows would never be seen"
            )

    @property
    def window_stride(self) -> tuple[int, int]:
        """The stride, or its default."""
        height, width = self.window or (0, 0)
        return self.stride or (max(1, 2 * height // 3), max(1, 2 * width // 3))

    def __str__(self) -> str:
        """Such as "scales 0.5, 1 with flip, windows 512x512 by 341x341, 2 stages"."""
        words = "whole image" if self.window is None else ""
        if self.scales != (1.0,):
            words = "scales " + ", ".join(f"{scale:g}" for scale in self.scales)
        if self.flip:
            words = f"{words} with flip".strip()
        if self.window is not None:
            (height, width), (down, right) = self.window, self.window_stride
            words += f"{', ' if words else ''}windows {height}x{width} by {down}x{right}"
        if self.softmax == "stride":
            words += ", softmax at the stride"
        if self.stages is not None:
            words += f", {self.stages} stage{'s' if self.stages > 1 else ''}"
        return words
