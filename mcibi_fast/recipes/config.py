"""The configuration of a training run: a dataclass whose fields the command line can set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from mcibi_fast.recipes.parts import (
    AdversarialConfig,
    AugmentationConfig,
    InferenceConfig,
    LossConfig,
    OptimizerConfig,
    check_range,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcibi_fast.data import EvalTransform, SegmentationDataset
    from mcibi_fast.models.registry import ModelKind


@dataclass
class ScenesData:
    """The built-in procedural scenes; splits "train", "val" and "test".

    Attributes:
        train_count: number of images in the training split.
        val_count: number of images in each other split.
        size: (height, width) of the scenes.
        seed: seed of the scenes; augmentation has its own seed.
    """

    train_count: int = 2000
    val_count: int = 200
    size: tuple[int, int] = (192, 192)
    seed: int = 0

    train_split = "train"
    val_split = "val"

    def dataset(self, split: str) -> SegmentationDataset:
        from mcibi_fast.data import Scenes

        count = self.train_count if split == "train" else self.val_count
        return Scenes(split, count=count, size=self.size, seed=self.seed)


@dataclass
class FolderData:
    """``images/<split>`` and ``labels/<split>`` under one root.

    Attributes:
        root: the folder.
        train_split, val_split: names of the two splits.
        classes: class names, if the folder itself lists none.
    """

    root: str = ""
    train_split: str = "train"
    val_split: str = "val"
    classes: list[str] | None = None

    def dataset(self, split: str) -> SegmentationDataset:
        from mcibi_fast.data import FolderDataset

        return FolderDataset(self.root, split, classes=self.classes)


@dataclass
class NamedData:
    """A published dataset, see `mcibi_fast.data.DATASETS`, and the size at which it is tested.

    Attributes:
        name: "ade20k", "cityscapes", ...
        root: its folder, its zip file, or the folder that holds its zip files.
        train_split, val_split: names of the two splits.
        short_side, long_side, size: arguments of `mcibi_fast.data.EvalTransform`; if none is given,
            images are tested at their own size.
    """

    name: str = ""
    root: str = ""
    train_split: str = "train"
    val_split: str = "val"
    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None

    def dataset(self, split: str) -> SegmentationDataset:
        """The split with the transform for evaluation, which the trainer replaces for training."""
        from mcibi_fast.data import named

        return _with_eval_transform(named(self.name)(self.root, split), self)


@dataclass
class ShardsData:
    """A dataset packed by ``mcibi-fast data pack``, and the size at which it is tested.

    Attributes:
        root: its folder, a URL, or "pipe:COMMAND" with {} for a path below the root; see
            `mcibi_fast.data.ShardedDataset`.
        train_split, val_split: names of the two splits.
        short_side, long_side, size: as in `NamedData`.
        cache: folder where shards from a URL are kept; None means the user's cache folder.
    """

    root: str = ""
    train_split: str = "train"
    val_split: str = "val"
    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None
    cache: str | None = None

    @classmethod
    def like(cls, data: ScenesData | FolderData | NamedData | ShardsData, root: str) -> ShardsData:
        """The same splits, tested at the same size, from the shards in ``root``."""
        shards = cls(root, data.train_split, data.val_split)
        if isinstance(data, (NamedData, ShardsData)):
            shards.short_side, shards.long_side = data.short_side, data.long_side
            shards.size = data.size
        if isinstance(data, ShardsData):
            shards.cache = data.cache
        return shards

    def dataset(self, split: str) -> SegmentationDataset:
        """The split with the transform for evaluation, which the trainer replaces for training."""
        from mcibi_fast.data import ShardedDataset

        return _with_eval_transform(ShardedDataset(self.root, split, cache=self.cache), self)


def eval_transform(
    data: NamedData | ShardsData, mean: Sequence[float], std: Sequence[float]
) -> EvalTransform:
    """The resize to the test size, and the normalisation."""
    from mcibi_fast.data import EvalTransform

    return EvalTransform(
        mean=mean,
        std=std,
        short_side=data.short_side,
        long_side=data.long_side,
        size=data.size,
    )


def _with_eval_transform(
    dataset: SegmentationDataset, data: NamedData | ShardsData
) -> SegmentationDataset:
    dataset.transform = eval_transform(data, dataset.mean, dataset.std)
    return dataset


@dataclass
class VideoData(NamedData):
    """A published video dataset as clips: "vspw" or "camvid".

    Attributes, besides `NamedData`'s:
        history: number of past frames in each sample, h of Eq. 19; 0 for an image model.
        train_frames: "one" random frame per video and epoch (VSPW's protocol), or "all".
        seed: seed for the choice of that frame.
        bad: what happens to label files of VSPW that are empty or in colour: "raise" an error when
            one is read, or "skip" them (they are searched for beforehand, which takes minutes).
    """

    history: int = 2
    train_frames: Literal["one", "all"] = "one"
    seed: int = 0
    bad: Literal["raise", "skip"] = "raise"

    def dataset(self, split: str) -> SegmentationDataset:
        """The split's clips with the transform for evaluation; see `NamedData.dataset`."""
        from mcibi_fast.data import ClipDataset, video_dataset

        source = video_dataset(self.name, self.root, split, bad=self.bad)
        frames = self.train_frames if split == self.train_split else "all"
        clips = ClipDataset(source, history=self.history, frames=frames, seed=self.seed)
        return _with_eval_transform(clips, self)


@dataclass
class MovingScenesData(ScenesData):
    """The built-in moving scenes as clips; ``train_count`` and ``val_count`` count videos.

    Attributes, besides `ScenesData`'s:
        length: number of frames in each video.
        degraded: share of the frames that are degraded.
        history, train_frames: see `VideoData`.
    """

    length: int = 40
    degraded: float = 0.35
    history: int = 2
    train_frames: Literal["one", "all"] = "one"

    def dataset(self, split: str) -> SegmentationDataset:
        from mcibi_fast.data import ClipDataset, MovingScenes

        source = MovingScenes(
            split,
            count=self.train_count if split == "train" else self.val_count,
            length=self.length,
            size=self.size,
            seed=self.seed,
            degraded=self.degraded,
        )
        frames = self.train_frames if split == "train" else "all"
        return ClipDataset(source, history=self.history, frames=frames, seed=self.seed)


@dataclass
class ModelConfig:
    """Arguments of `mcibi_fast.models.create`.

    Attributes:
        framework: one of `mcibi_fast.models.frameworks()`.
        backbone: any timm model with feature maps.
        options: further options of that model (feats_channels, form, ...).
        memory: one of `mcibi_fast.models.memories()`, or None.
        history: number of past frames of a video model (``data.history`` must be the same); 0 for
            an image model.
    """

    framework: str = "fcn"
    backbone: str = "resnet50"
    options: dict[str, Any] = field(default_factory=dict)
    memory: str | None = "mcibipp"
    history: int = 0

    @classmethod
    def named(cls, name: str, backbone: str, options: dict[str, Any] | None = None) -> ModelConfig:
        """A model by its one-word name, such as "fcn_mcibipp"."""
        config = cls(backbone=backbone, options=dict(options or {}))
        config.name = name
        return config

    @property
    def name(self) -> str:
        """The model in one word, such as "fcn_mcibipp" or "upernet_video_mcibipp".

        Setting it sets framework, memory and history; an unknown name raises ValueError.
        """
        return self._kind().name

    @name.setter
    def name(self, name: str) -> None:
        from mcibi_fast.models.registry import parse

        self.framework, self.memory, self.history = parse(name)

    def arguments(self) -> dict[str, Any]:
        """The options that `create` takes with ``name``, including a video model's history."""
        kind = self._kind()
        return self.options | ({"history": kind.history} if kind.history else {})

    def validate(self) -> None:
        """Raises ValueError, naming the field, if there is no such model."""
        self._kind()

    def _kind(self) -> ModelKind:
        from mcibi_fast.models.registry import parse

        history = self.options.get("history", self.history)
        try:
            return parse(self.framework, self.memory, history)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error


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
        epochs: number of passes over the training split.
        batch_size: number of images per optimizer step, over all processes and micro-batches; an
            incomplete last batch is dropped.
        accumulate: number of micro-batches in which each process computes its share of a batch.
        ema: decay of the moving average of the weights that is evaluated and saved; None means no
            average.
        sync_batchnorm: compute batch norms over all processes (in a distributed run on GPUs).
        seed: seed of initial weights, dropout, the order of images and augmentation.
        mixed_precision: "no", "bf16" or "fp16".
        device: "auto" (a GPU if there is one) or "cpu".
        workers: number of loader processes per training process.
        log_every: number of steps between readings of the loss.
        checkpoint_every: number of steps between checkpoints within an epoch; 0 saves only at the
            end of each epoch.
        evaluate_every: number of epochs between evaluations; the last epoch is always evaluated.
        eval_batch_size: number of images of equal size that each process evaluates at once.
    """

    data: ScenesData | FolderData | NamedData | ShardsData = field(default_factory=ScenesData)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    epochs: int = 20
    batch_size: int = 16
    accumulate: int = 1
    ema: float | None = None
    sync_batchnorm: bool = True
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    workers: int = 2
    log_every: int = 10
    checkpoint_every: int = 0
    evaluate_every: int = 1
    eval_batch_size: int = 1

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a number that makes no sense."""
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
        for part in (self.model, self.optimizer, self.loss, self.adversarial):
            part.validate()
        if not isinstance(self.data, ScenesData) and not self.data.root:
            raise ValueError("data.root: this recipe reads a folder; give it with --root DIR")
        self.inference.validate()

    def to_dict(self) -> dict[str, Any]:
        """The configuration as dictionaries, lists and values that JSON can hold."""
        return asdict(self) | {"data": {"kind": type(self.data).__name__} | asdict(self.data)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: the dictionary is not a training configuration.
        """
        try:
            data = dict(stored["data"])
            kinds = {kind.__name__: kind for kind in _DATA}
            kind = kinds[data.pop("kind")]
            parts: dict[str, Any] = {
                "data": _rebuild(kind, data),
                "model": _rebuild_model(stored["model"]),
                "optimizer": _rebuild(OptimizerConfig, stored["optimizer"]),
                "augmentation": _rebuild(AugmentationConfig, stored["augmentation"]),
                # Early versions did not store this and tested with the default.
                "inference": _rebuild(InferenceConfig, stored.get("inference", {})),
            }
            # Runs of earlier versions did not store these.
            for name, part in (("loss", LossConfig), ("adversarial", AdversarialConfig)):
                parts[name] = _rebuild(part, stored.get(name, {}))
            return _rebuild(cls, stored | parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a training configuration: {error}") from error


_DATA = (ScenesData, FolderData, NamedData, ShardsData, VideoData, MovingScenesData)


def _rebuild_model(values: dict[str, Any]) -> ModelConfig:
    if "name" not in values:
        return _rebuild(ModelConfig, values)
    # Earlier versions stored the model as one word.
    return ModelConfig.named(values["name"], values["backbone"], values["options"])


def _rebuild(cls: Any, values: dict[str, Any]) -> Any:
    """The dataclass from values read from JSON; its tuple fields are tuples again, not lists."""
    types = {item.name: item.type for item in fields(cls)}
    unknown = values.keys() - types.keys()
    if unknown:
        raise KeyError(f"{cls.__name__} has no {sorted(unknown)[0]!r}")
    tuples = {name for name, annotation in types.items() if str(annotation).startswith("tuple")}
    return cls(**{k: tuple(v) if k in tuples and v is not None else v for k, v in values.items()})
