"""Parts of a training configuration: optimiser, losses, augmentation, adversarial images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from mcibi_fast.protocols import TestProtocol, check_test_protocol

if TYPE_CHECKING:
    from mcibi_fast.data import SegmentationDataset, Transform
    from mcibi_fast.data.functions import Augmentation


@dataclass
class OptimizerConfig:
    """Optimiser and poly schedule.

    Attributes:
        name: "sgd" or "adamw".
        lr: initial learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay: an L2 penalty for SGD, decoupled for AdamW.
        power: exponent of the poly schedule.
        floor: final learning rate as a share of the initial one: 0 in the paper, 0.01 in the
            released code.
        clip_norm: largest total norm of the gradient; None means no clipping.
        backbone_lr: factor on the learning rate of the backbone.
        layer_decay: factor by which the learning rate decreases with each block of the backbone,
            counted from its end; 1 means no decrease.
        decay_norms: apply weight decay to norms, biases and position tables as well.
        warmup_steps: number of optimizer steps during which a factor that rises linearly to 1
            multiplies the schedule; 0 means no warm-up.
        warmup_start: the value of that factor at the first step.
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
        short_side, long_side, size: the size that the scale multiplies; if none is given, the
            image's own size.
        max_class_share: largest share of one class in a crop.
        rotation: largest angle of rotation in degrees, in either direction.
        rotation_probability: probability of a rotation.
        style_mixing: probability that a crop takes the style of another image, see
            `mcibi_fast.data.StyleMixing`.
        style_band: the band of frequencies whose amplitudes it takes.
        function: "MODULE:NAME" of a pipeline of albumentations, or of a function ``(image, label,
            rng) -> (image, label)``. It replaces all of the above but ``crop_size``, to which its
            results are padded; see `mcibi_fast.data.FunctionTransform`.
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
    function: str | None = None

    def transform(
        self, dataset: SegmentationDataset, seed: int, function: Augmentation | None = None
    ) -> Transform:
        """The transform of a training split.

        Args:
            dataset: the split.
            seed: seeds the random draws.
            function: what the field of that name names; None imports it.

        Raises:
            ValueError: a field is out of range, or the function cannot be imported.
        """
        from mcibi_fast.data import StyleMixing, TrainTransform
        from mcibi_fast.data.functions import FunctionTransform

        if function is None and self.function is not None:
            function = self._imported(self.function)
        if function is not None:
            if self.style_mixing:
                raise ValueError(
                    "augmentation.style_mixing: not together with augmentation.function"
                )
            return FunctionTransform(
                function,
                self.crop_size,
                mean=dataset.mean,
                std=dataset.std,
                seed=seed,
                ignore_index=dataset.ignore_index,
                num_classes=len(dataset.classes),
                name=f"augmentation: {self.function or named(function)}",
            )
        options = asdict(self)
        del options["function"]
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

    @staticmethod
    def _imported(path: str) -> Augmentation:
        from mcibi_fast.data.functions import load_function

        try:
            return load_function(path)
        except ValueError as error:
            raise ValueError(f"augmentation.function: {error}") from error


@dataclass
class StoredAugmentationConfig(AugmentationConfig):
    """The augmentation of a run whose ``config.json`` names a function.

    The run may be from someone else, so nothing is imported unless the user asks for it.
    """

    @staticmethod
    def _imported(path: str) -> Augmentation:
        raise ValueError(
            f"augmentation.function: {path} is named by a run's config.json, and is not imported "
            f"without your consent; if you trust it, give it again: --augmentation {path} (in "
            "Python, the function itself as train's argument augmentation)"
        )


def named(function: object) -> str:
    """A name for a function or a pipeline, such as "my_module:augment" or "Compose"."""
    name = getattr(function, "__qualname__", None)
    if name is None:
        return type(function).__name__
    return f"{getattr(function, '__module__', '')}:{name}"


@dataclass
class LossConfig:
    """Arguments of `mcibi_fast.nn.PixelLoss`, the loss of every head.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: one number per class, or "balanced": ``a / ln(1.02 + p_c)``, where p_c is the
            class's share of the labelled pixels in the train split and ``a`` makes the mean of the
            weights over these pixels 1. A run's config.json holds the numbers.
        ohem_threshold: only pixels whose right class has a probability below this threshold count.
        ohem_min_kept: keep at least this many pixels per process and micro-batch.
        cross_entropy: weight of the prediction's cross entropy, ``loss_cls``; those of the weights
            W and of auxiliary heads stay.
        dice, lovasz, focal: weights of further losses of the prediction, from
            segmentation_models_pytorch; 0 leaves one out. They form the logits at the labels' size,
            and are of each process's and micro-batch's own pixels.
        focal_gamma: exponent of the focal loss.
    """

    label_smoothing: float = 0.0
    class_weights: list[float] | Literal["balanced"] | None = None
    ohem_threshold: float | None = None
    ohem_min_kept: int = 100_000
    cross_entropy: float = 1.0
    dice: float = 0.0
    lovasz: float = 0.0
    focal: float = 0.0
    focal_gamma: float = 2.0

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense."""
        smoothing = self.label_smoothing
        check_range("loss.label_smoothing", smoothing, "0 or more, less than 1", least=0, below=1)
        if self.ohem_threshold is not None:
            threshold = self.ohem_threshold
            check_range("loss.ohem_threshold", threshold, "above 0, at most 1", above=0, most=1)
        check_range("loss.ohem_min_kept", self.ohem_min_kept, "at least 1", least=1)
        for name in ("cross_entropy", "dice", "lovasz", "focal", "focal_gamma"):
            check_range(f"loss.{name}", getattr(self, name), "0 or more", least=0)
        if not any((self.cross_entropy, self.dice, self.lovasz, self.focal)):
            raise ValueError("loss: cross_entropy, dice, lovasz and focal are all 0")
        for weight in self.class_weights if isinstance(self.class_weights, list) else []:
            check_range("loss.class_weights", weight, "0 or more", least=0)


@dataclass
class AdversarialConfig:
    """Adversarial images in training, see `mcibi_fast.training.adversarial`.

    Attributes:
        probability: probability that a step trains on such images instead of the plain ones; 0
            turns them off.
        epsilon: largest change of a colour, on a scale from 0 to 255.
    """

    probability: float = 0.0
    epsilon: float = 2.0

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense."""
        check_range("adversarial.probability", self.probability, "0 to 1", least=0, most=1)
        check_range("adversarial.epsilon", self.epsilon, "0 or more, in 1/255", least=0)


@dataclass
class SpeedConfig:
    """What makes a training faster. All but ``compile`` is for GPUs and does nothing on a CPU.

    Attributes:
        tf32: multiply and convolve float32 in TF32 (10 bits of mantissa) while training.
        cudnn_benchmark: let cuDNN try its algorithms on the first batch and keep the fastest.
        fused_optimizer: update all weights in one kernel.
        compile: compile the training step with ``torch.compile``; evaluations during the training
            run as they are.
    """

    tf32: bool = True
    cudnn_benchmark: bool = True
    fused_optimizer: bool = True
    compile: bool = False

    @classmethod
    def of_earlier_versions(cls) -> SpeedConfig:
        """What runs used that did not store it."""
        return cls(tf32=False, cudnn_benchmark=False, fused_optimizer=False)


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
    if not (least <= value <= most and above < value < below):  # refuses NaN and infinity, too
        raise ValueError(f"{name}: expected {expected}, got {value}")


@dataclass(frozen=True)
class InferenceConfig:
    """How a model is tested: predictions for several views of an image are averaged.

    See `mcibi_fast.inference.labels`.

    Attributes:
        scales: factors on the sides of the test image; each gives a view.
        flip: also use each view mirrored.
        window: (height, width) of sliding windows; None takes each view as a whole.
        stride: (down, right) from one window to the next; None is two thirds of the window, for
            example 341 for 512.
        softmax: where probabilities are computed: at the size of the "labels", at the network's
            "stride" (the released code's ``use_probs_before_resize``, which its MCIBI++
            configurations with sliding windows turn on), or nowhere: "none" averages logits. In the
            released protocol, which has no probabilities at the labels' size, "labels" is "none".
        stages: number of stages of iterative inference (section 3.5); None uses the model's own.
        threshold: for two classes: class 1 is predicted where its probability is above this,
            instead of 0.5.
        protocol: how views are made and combined: "own", or "released": as in the released code,
            whose published numbers were made this way.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    softmax: Literal["labels", "stride", "none"] = "labels"
    stages: int | None = None
    protocol: TestProtocol = "own"
    threshold: float | None = None

    @property
    def is_single_view(self) -> bool:
        """Whether testing is a single pass over the whole image."""
        return len(self.scales) == 1 and not self.flip and self.window is None

    def validate(self) -> None:
        """Raises ValueError, naming the field, for settings that make no sense."""
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"inference.scales: expected positive numbers, got {self.scales}")
        if self.softmax not in ("labels", "stride", "none"):
            raise ValueError(
                f"inference.softmax: expected labels, stride or none, got {self.softmax}"
            )
        try:
            check_test_protocol(self.protocol)
        except ValueError as error:
            raise ValueError(f"inference.{error}") from None
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"inference.stages: expected at least 1, got {self.stages}")
        if self.threshold is not None:
            check_range("inference.threshold", self.threshold, "between 0 and 1", above=0, below=1)
        if self.window is None:
            if self.stride is not None:
                raise ValueError("inference.stride: needs sliding windows; give inference.window")
            return
        for name, sides in (("window", self.window), ("stride", self.window_stride)):
            if min(sides) < 1:
                raise ValueError(f"inference.{name}: expected positive sides, got {sides}")
        if any(s > w for s, w in zip(self.window_stride, self.window, strict=True)):
            raise ValueError(
                f"inference.stride: {self.window_stride} is more than the window {self.window}: "
                "pixels between two windows would be left out"
            )

    @property
    def window_stride(self) -> tuple[int, int]:
        """The stride, or its default."""
        height, width = self.window or (0, 0)
        return self.stride or (max(1, 2 * height // 3), max(1, 2 * width // 3))

    @property
    def averages(self) -> Literal["labels", "stride", "none"]:
        """``softmax``, as the protocol understands it."""
        if self.protocol == "released" and self.softmax == "labels":
            return "none"
        return self.softmax

    def __str__(self) -> str:
        """For example "scales 0.5, 1 with flip, windows 512x512 by 341x341, own protocol"."""
        words = "whole image" if self.window is None else ""
        if self.scales != (1.0,):
            words = "scales " + ", ".join(f"{scale:g}" for scale in self.scales)
        if self.flip:
            words = f"{words} with flip".strip()
        if self.window is not None:
            (height, width), (down, right) = self.window, self.window_stride
            words += f"{', ' if words else ''}windows {height}x{width} by {down}x{right}"
        if self.averages == "stride":
            at_windows = self.protocol == "released" and self.window is not None
            words += ", softmax at the " + ("windows' size" if at_windows else "stride")
        elif self.averages == "none" and self.protocol == "own":
            words += ", mean of logits"
        if self.stages is not None:
            words += f", {self.stages} stage{'s' if self.stages > 1 else ''}"
        if self.threshold is not None:
            words += f", threshold {self.threshold:g}"
        return f"{words}, {self.protocol} protocol"
