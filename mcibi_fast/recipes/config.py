"""The configuration of a training run: a dataclass whose fields the command line can set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mcibi_fast.recipes.parts import (
    AdversarialConfig,
    AugmentationConfig,
    InferenceConfig,
    LossConfig,
    OptimizerConfig,
    SpeedConfig,
    StoredAugmentationConfig,
    check_range,
)
from mcibi_fast.recipes.sources import (
    KINDS,
    Data,
    ScenesData,
    ShardsData,
    StoredShardsData,
    refused_elsewhere,
)
from mcibi_fast.recipes.stopping import StoppingConfig
from mcibi_fast.recipes.stored import rebuild
from mcibi_fast.untrusted import read_json, shorten

if TYPE_CHECKING:
    from mcibi_fast.models.registry import ModelKind
    from mcibi_fast.models.weights import Precision


@dataclass
class ModelConfig:
    """Arguments of `mcibi_fast.models.create`.

    Attributes:
        framework: one of `mcibi_fast.models.frameworks()`.
        backbone: any timm model with feature maps.
        options: further options of that model (feats_channels, form, ...).
        memory: one of `mcibi_fast.models.memories()`, or None.
        history: number of past frames of a video model (``data.history`` must be the same); 0 for
            an image model. With a method, 0 means its usual number.
        method: one of `mcibi_fast.models.video_methods()`; None for an image model and for
            Video-MCIBI++.
    """

    framework: str = "fcn"
    backbone: str = "resnet50"
    options: dict[str, Any] = field(default_factory=dict)
    memory: str | None = "mcibipp"
    history: int = 0
    method: str | None = None

    @classmethod
    def named(cls, name: str, backbone: str, options: dict[str, Any] | None = None) -> ModelConfig:
        """A model by its one-word name, such as "fcn_mcibipp"."""
        config = cls(backbone=backbone, options=dict(options or {}))
        config.name = name
        return config

    @property
    def name(self) -> str:
        """The model in one word, such as "fcn_mcibipp" or "upernet_video_mcibipp".

        Setting it sets framework, memory, history and method; an unknown name raises ValueError.
        """
        return self._kind().name

    @name.setter
    def name(self, name: str) -> None:
        from mcibi_fast.models.registry import parse

        self.framework, self.memory, self.history, self.method = parse(name)

    def arguments(self) -> dict[str, Any]:
        """The options that `create` takes with ``name``, including a video model's history."""
        kind = self._kind()
        return self.options | ({"history": kind.history} if kind.history else {})

    def gap(self) -> int:
        """Number of frames from one frame of a clip to the next, which ``data.gap`` must be."""
        from mcibi_fast.models.registry import usual_gap

        return self.options.get("gap", usual_gap(self._kind().method))

    def validate(self) -> None:
        """Raises ValueError, naming the field, if there is no such model."""
        self._kind()

    def _kind(self) -> ModelKind:
        from mcibi_fast.models.registry import parse

        history = self.options.get("history", self.history or (None if self.method else 0))
        try:
            return parse(self.framework, self.memory, history, self.method)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error


MixedPrecision = Literal["auto", "measured", "no", "bf16", "fp16"]


def _default_precision() -> MixedPrecision:
    import torch

    return "auto" if torch.accelerator.is_available() else "no"


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        data: where the images come from.
        model: the model that is trained.
        optimizer: the optimiser and its schedule.
        augmentation: how training images are augmented.
        loss: the loss of every head.
        adversarial: training on images that are changed to raise the loss.
        inference: how the model is tested, during training and by later evaluations.
        speed: what makes it faster.
        stopping: when it ends before its last epoch.
        epochs: number of passes over the training split.
        batch_size: number of images per optimizer step, over all processes and micro-batches; an
            incomplete last batch is dropped.
        accumulate: number of micro-batches in which each process computes its share of a batch.
        ema: decay of the moving average of the weights that is evaluated and saved; None means no
            average.
        sync_batchnorm: compute batch norms over all processes (in a distributed run on GPUs).
        sampling: "shuffle", each image once per epoch; or "balanced": as many draws, each of a
            class (all as likely) and then of an image that it occurs in, see
            `mcibi_fast.training.sampling`.
        trackers: where losses and scores also go besides ``history.jsonl``: "tensorboard" (the
            run's own writer), "csv" (``scalars.csv``), and those of accelerate: "wandb",
            "mlflow", ...; see `mcibi_fast.training.trackers`.
        seed: seed of initial weights, dropout, the order of images and augmentation.
        mixed_precision: "no", the default without a GPU; "bf16"; "fp16"; "auto", the default with
            one: bf16 on a GPU that computes in it and "no" on a CPU; or "measured": bf16 if a few
            steps before the training are faster in it by more than 10 %. A run's config.json holds
            what was chosen.
        gradient_checkpointing: keep fewer activations and compute them again in the backward pass:
            less memory, about a third more time, the same result up to rounding.
        device: "auto" (a GPU if there is one) or "cpu".
        workers: number of loader processes per training process, at most one for each core.
        log_every: number of steps between readings of the loss.
        checkpoint_every: number of steps between checkpoints within an epoch; 0 saves only at the
            end of each epoch.
        evaluate_every: number of epochs between evaluations; the last epoch is always evaluated.
        eval_batch_size: number of images of equal size that each process evaluates at once.
    """

    data: Data = field(default_factory=ScenesData)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    epochs: int = 20
    batch_size: int = 16
    accumulate: int = 1
    ema: float | None = None
    sync_batchnorm: bool = True
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    seed: int = 0
    mixed_precision: MixedPrecision = field(default_factory=_default_precision)
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"
    workers: int = 2
    log_every: int = 10
    checkpoint_every: int = 0
    evaluate_every: int = 1
    eval_batch_size: int = 1

    def validate(self, *, needs_root: bool = True) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense.

        Args:
            needs_root: whether a missing folder of the data is an error, too.
        """
        counts = ("epochs", "batch_size", "accumulate", "log_every", "evaluate_every")
        for name in (*counts, "eval_batch_size"):
            check_range(name, getattr(self, name), "at least 1", least=1)
        for name in ("workers", "checkpoint_every", "seed"):
            check_range(name, getattr(self, name), "0 or more", least=0)
        if self.ema is not None:
            check_range("ema", self.ema, "a decay of at least 0, less than 1", least=0, below=1)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size: {self.batch_size} is not a multiple of accumulate={self.accumulate}"
            )
        for part in (self.model, self.optimizer, self.loss, self.adversarial, self.stopping):
            part.validate()
        self._check_gap()
        if needs_root and not isinstance(self.data, ScenesData) and not self.data.root:
            raise ValueError("data.root: this recipe reads a folder; give it with --root DIR")
        for number in self.data.mean or ():
            check_range("data.mean", number, "three numbers for colours in 0..1")
        for number in self.data.std or ():
            check_range("data.std", number, "three positive numbers", above=0)
        self.inference.validate()

    def _check_gap(self) -> None:
        wanted, given = self.model.gap(), getattr(self.data, "gap", 1)
        if "history" in self.model.arguments() and wanted != given:
            raise ValueError(
                f"data.gap: {given}, but the frames of the model's clips are {wanted} apart; give "
                f"data.gap={wanted} or model.options.gap={given}"
            )

    @property
    def precision(self) -> Precision:
        """The mixed precision of a run; "no" as long as none has been chosen."""
        if self.mixed_precision == "auto" or self.mixed_precision == "measured":
            return "no"
        return self.mixed_precision

    def to_dict(self) -> dict[str, Any]:
        """The configuration as dictionaries, lists and values that JSON can hold."""
        refused = isinstance(self.data, StoredShardsData)
        kind = ShardsData if refused else type(self.data)
        return asdict(self) | {"data": {"kind": kind.__name__} | asdict(self.data)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; the dictionary may come from a file that is not trusted.

        Shards at a URL or behind a command are then not read: see `StoredShardsData`.

        Raises:
            ValueError: the dictionary is not a training configuration.
        """
        try:
            data = dict(stored["data"])
            kind = KINDS[data.pop("kind")]
            parts: dict[str, Any] = {
                "data": refused_elsewhere(rebuild(kind, data)),
                "model": _rebuild_model(stored["model"]),
                "optimizer": rebuild(OptimizerConfig, stored["optimizer"]),
                "augmentation": rebuild(AugmentationConfig, stored["augmentation"]),
                # Early versions did not store this and tested with the default.
                "inference": rebuild(InferenceConfig, stored.get("inference", {})),
            }
            # Runs of earlier versions did not store these.
            for name, part in (
                ("loss", LossConfig),
                ("adversarial", AdversarialConfig),
                ("stopping", StoppingConfig),
            ):
                parts[name] = rebuild(part, stored.get(name, {}))
            if parts["augmentation"].function is not None:
                own = vars(parts["augmentation"])
                parts["augmentation"] = StoredAugmentationConfig(**own)
            speed = stored.get("speed", asdict(SpeedConfig.of_earlier_versions()))
            parts["speed"] = rebuild(SpeedConfig, speed)
            return rebuild(cls, {"mixed_precision": "no"} | stored | parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a training configuration: {shorten(error, 800)}") from error


def _rebuild_model(values: dict[str, Any]) -> ModelConfig:
    if "name" in values:  # earlier versions stored one word
        model = ModelConfig.named(values["name"], values["backbone"], values["options"])
    else:
        model = rebuild(ModelConfig, values)
    model.validate()
    return model


def read_stored(folder: Path) -> dict[str, Any]:
    """The configuration in a run's directory, as it was written.

    Raises:
        ValueError: the directory holds no run, or the file is not one of a run's.
    """
    file = folder / "config.json"
    try:
        config = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"resume: {folder} holds no run (no config.json)") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a training configuration")
    return config


def read_settings(folder: Path) -> TrainConfig:
    """The configuration in a run's directory, as a training takes it.

    Raises:
        ValueError: as in `read_stored`, or this version cannot use the configuration.
    """
    stored = read_stored(folder)
    try:
        return TrainConfig.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
