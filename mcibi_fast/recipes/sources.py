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
    """

    root: str = ""
    train_split: str = "train"
    val_split: str = "val"
    classes: list[str] | None = None
    binary: bool = False

    def dataset(self, split: str) -> SegmentationDataset:
        from mcibi_fast.data import FolderDataset

        return FolderDataset(self.root, split, classes=self.classes, binary=self.binary)


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


Data = ScenesData | FolderData | NamedData | ShardsData
KINDS = {
    kind.__name__: kind
    for kind in (ScenesData, FolderData, NamedData, ShardsData, VideoData, MovingScenesData)
}


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
