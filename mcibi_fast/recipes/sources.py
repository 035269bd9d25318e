"""Where the images of a training run come from: one dataclass for each kind of data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcibi_fast.data import EvalTransform, SegmentationDataset


@dataclass
class Normalisation:
    """How a training normalises its images, whatever the data.

    Attributes:
        mean, std: three numbers each, for colours in 0..1; None takes those of the pretrained
            weights (`mcibi_fast.models.normalisation`), or the dataset's if there are no such
            weights. A checkpoint keeps the numbers of its training.
    """

    mean: tuple[float, float, float] | None = field(default=None, kw_only=True)
    std: tuple[float, float, float] | None = field(default=None, kw_only=True)


@dataclass
class ScenesData(Normalisation):
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
class FolderData(Normalisation):
    """``images/<split>`` and ``labels/<split>`` under one root.

    Attributes:
        root: the folder.
        train_split, val_split: names of the two splits.
        classes: class names, if the folder itself lists none.
        binary: masks hold 0 and 255, and 255 is class 1 instead of ignored.
        reduce_labels: label 0 is ignored, and the others are one class lower.
    """

    root: str = ""
    train_split: str = "train"
    val_split: str = "val"
    classes: list[str] | None = None
    binary: bool = False
    reduce_labels: bool = False

    def dataset(self, split: str) -> SegmentationDataset:
        from mcibi_fast.data import FolderDataset

        return FolderDataset(
            self.root,
            split,
            classes=self.classes,
            binary=self.binary,
            reduce_labels=self.reduce_labels,
        )


@dataclass
class NamedData(Normalisation):
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
class ShardsData(Normalisation):
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
    def like(cls, data: Data, root: str) -> ShardsData:
        """The same splits, tested at the same size, from the shards in ``root``."""
        shards = cls(root, data.train_split, data.val_split, mean=data.mean, std=data.std)
        if isinstance(data, Sized):
            shards.short_side, shards.long_side = data.short_side, data.long_side
            shards.size = data.size
        if isinstance(data, ShardsData):
            shards.cache = data.cache
        return shards

    def dataset(self, split: str) -> SegmentationDataset:
        """The split with the transform for evaluation, which the trainer replaces for training."""
        from mcibi_fast.data import ShardedDataset

        return _with_eval_transform(ShardedDataset(self.root, split, cache=self.cache), self)


@dataclass
class StoredShardsData(ShardsData):
    """Shards at a URL or behind a command that a run's ``config.json`` names.

    The run may be from someone else, so nothing is fetched and no command is run unless the user
    asks for it; only the samples cannot be read. `relocated` returns data that can be read.
    """

    def dataset(self, split: str) -> SegmentationDataset:
        """Raises ValueError, since the samples must not be read."""
        what = "a command" if self.root.startswith("pipe:") else "a URL"
        raise ValueError(
            f"data.root: {self.root} is {what} named by a run's config.json, and is not used "
            "without your consent; if you trust it, give it with --root"
        )


@dataclass
class CocoData(Normalisation):
    """Objects annotated in COCO's JSON, see `mcibi_fast.data.CocoDataset`.

    Attributes:
        root: its folder.
        train_split, val_split: names of the two splits.
        annotations, images: the file of annotations and the folder of images, relative to ``root``
            and with {split} for the split; None looks in the usual places.
        background: pixels without an object are class 0, "background"; if false they are ignored.
        crowd: "ignore" crowds, or paint them as their "class".
        short_side, long_side, size: as in `NamedData`.
    """

    root: str = ""
    train_split: str = "train2017"
    val_split: str = "val2017"
    annotations: str | None = None
    images: str | None = None
    background: bool = True
    crowd: Literal["ignore", "class"] = "ignore"
    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None

    def splits(self) -> list[str]:
        """The splits in the folder."""
        from mcibi_fast.data.coco import coco_splits

        if self.annotations is not None:
            return [self.train_split, self.val_split]
        return coco_splits(self.root)

    def dataset(self, split: str) -> SegmentationDataset:
        """The split with the transform for evaluation, which the trainer replaces for training."""
        from mcibi_fast.data import CocoDataset

        dataset = CocoDataset(
            self.root,
            split,
            annotations=self.annotations,
            images=self.images,
            background=self.background,
            crowd=self.crowd,
        )
        return _with_eval_transform(dataset, self)


@dataclass
class HuggingFaceData(Normalisation):
    """A folder that ``save_to_disk`` of Hugging Face's `datasets` wrote.

    Attributes:
        root: the folder.
        train_split, val_split: names of the two splits.
        image, label: names of the columns.
        classes: class names, if the folder has no ``classes.txt`` or ``classes.json``.
        reduce_labels: label 0 is ignored, and the others are one class lower.
        short_side, long_side, size: as in `NamedData`.
    """

    root: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    image: str = "image"
    label: str = "label"
    classes: list[str] | None = None
    reduce_labels: bool = False
    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None

    def splits(self) -> list[str]:
        """The splits in the folder."""
        from mcibi_fast.data.huggingface import open_splits

        return list(open_splits(self.root))

    def dataset(self, split: str) -> SegmentationDataset:
        """The split with the transform for evaluation, which the trainer replaces for training."""
        from mcibi_fast.data import HuggingFaceDataset

        dataset = HuggingFaceDataset(
            self.root,
            split,
            image=self.image,
            label=self.label,
            classes=self.classes,
            reduce_labels=self.reduce_labels,
        )
        return _with_eval_transform(dataset, self)


def eval_transform(data: Sized, mean: Sequence[float], std: Sequence[float]) -> EvalTransform:
    """The resize to the test size, and the normalisation."""
    from mcibi_fast.data import EvalTransform

    return EvalTransform(
        mean=mean,
        std=std,
        short_side=data.short_side,
        long_side=data.long_side,
        size=data.size,
    )


def _with_eval_transform(dataset: SegmentationDataset, data: Sized) -> SegmentationDataset:
    dataset.transform = eval_transform(data, dataset.mean, dataset.std)
    return dataset


@dataclass
class VideoData(NamedData):
    """A published video dataset as clips: "vspw" or "camvid".

    Attributes, besides `NamedData`'s:
        history: number of past frames in each sample, h of Eq. 19; 0 for an image model.
        gap: number of frames from one frame of a sample to the next.
        train_frames: "one" random frame per video and epoch (VSPW's protocol), or "all".
        seed: seed for the choice of that frame.
        bad: what happens to label files of VSPW that are empty or in colour: "raise" an error when
            one is read, or "skip" them (they are searched for beforehand, which takes minutes).
    """

    history: int = 2
    gap: int = 1
    train_frames: Literal["one", "all"] = "one"
    seed: int = 0
    bad: Literal["raise", "skip"] = "raise"

    def dataset(self, split: str) -> SegmentationDataset:
        """The split's clips with the transform for evaluation; see `NamedData.dataset`."""
        from mcibi_fast.data import ClipDataset, video_dataset

        source = video_dataset(self.name, self.root, split, bad=self.bad)
        frames = self.train_frames if split == self.train_split else "all"
        clips = ClipDataset(
            source, history=self.history, gap=self.gap, frames=frames, seed=self.seed
        )
        return _with_eval_transform(clips, self)


@dataclass
class MovingScenesData(ScenesData):
    """The built-in moving scenes as clips; ``train_count`` and ``val_count`` count videos.

    Attributes, besides `ScenesData`'s:
        length: number of frames in each video.
        degraded: share of the frames that are degraded.
        history, gap, train_frames: see `VideoData`.
    """

    length: int = 40
    degraded: float = 0.35
    history: int = 2
    gap: int = 1
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
        return ClipDataset(
            source, history=self.history, gap=self.gap, frames=frames, seed=self.seed
        )


Sized = NamedData | ShardsData | CocoData | HuggingFaceData
"""Data that say at which size they are tested."""

Data = ScenesData | FolderData | Sized
FORMATS: dict[str, type[CocoData | HuggingFaceData]] = {
    "coco": CocoData,
    "huggingface": HuggingFaceData,
}
"""Anyone's data in the format of another toolbox, by the name in the command line."""

_KINDS: tuple[type[Data], ...] = (
    ScenesData,
    FolderData,
    NamedData,
    ShardsData,
    VideoData,
    MovingScenesData,
    *FORMATS.values(),
)
KINDS = {kind.__name__: kind for kind in _KINDS}


def relocated(data: Data, root: str) -> Data:
    """The same data at another place: in another folder, or packed into shards.

    Raises:
        ValueError: the data are the built-in scenes.
    """
    from mcibi_fast.data.shards import holds_shards

    if isinstance(data, ScenesData):
        raise ValueError("--root: the run's data are the built-in scenes, which read no folder")
    if isinstance(data, ShardsData) or holds_shards(root):
        return ShardsData.like(data, root)
    return replace(data, root=root)


def refused_elsewhere(data: Data) -> Data:
    """The data that a file names; if they are at a URL or behind a command, they cannot be read.

    See `StoredShardsData`.
    """
    root = getattr(data, "root", "")
    if isinstance(data, ShardsData) and (root.startswith("pipe:") or "://" in root):
        return StoredShardsData(**{item.name: getattr(data, item.name) for item in fields(data)})
    return data
