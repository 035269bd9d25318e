"""Videos, clips and streams: order, the past, one augmentation per clip, one frame per video."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mcibi_fast.data import ClipDataset, DataError, EvalTransform, TrainTransform, VideoDataset
from mcibi_fast.data.loading import evaluation_loader, training_loader

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIZES = (4, 1, 3)


class Noise(VideoDataset):
    """Three videos of 4, 1 and 3 frames of noise, 20x30; frame 1 of the last has no label."""

    classes: ClassVar[list[str]] = [f"class {k}" for k in range(5)]
    palette = np.zeros((5, 3), np.uint8)
    mean, std = MEAN, STD
    odd_size = False

    def videos(self) -> list[str]:
        return ["a", "b", "c"]

    def frames(self, video: int) -> int:
        return SIZES[video]

    def labelled(self, video: int) -> Sequence[int]:
        return [0, 2] if video == 2 else range(SIZES[video])

    def frame_name(self, video: int, frame: int) -> str:
        return f"{self.videos()[video]}/{frame}"

    def read_frame(self, video: int, frame: int) -> tuple[np.ndarray, np.ndarray | None]:
        rng = np.random.default_rng((video, frame))
        size = (10, 30) if self.odd_size and frame == 1 else (20, 30)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        label = rng.choice(np.array([0, 1, 2, 3, 4, 255], np.uint8), size)
        return pixels, None if (video, frame) == (2, 1) else label


def pixels_of(dataset: Noise, video: int, frame: int) -> torch.Tensor:
    return (
        torch.from_numpy(dataset.read_frame(video, frame)[0]).permute(2, 0, 1) / 255 - 0.5
    ) / 0.25


def test_a_video_dataset_is_a_dataset_of_its_labelled_frames() -> None:
    dataset = Noise()
    assert len(dataset) == 7
    assert [dataset.locate(i) for i in range(7)] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 2),
    ]  # fmt: skip
    assert [dataset[i]["name"] for i in range(7)] == [
        "a/0",
        "a/1",
        "a/2",
        "a/3",
        "b/0",
        "c/0",
        "c/2",
    ]
    torch.testing.assert_close(dataset[6]["image"], pixels_of(dataset, 2, 2))
    assert np.array_equal(dataset[6]["label"], dataset.read_frame(2, 2)[1])
    with pytest.raises(IndexError):
        dataset[7]


def test_frames_and_streams() -> None:
    dataset = Noise()
    dataset.transform = EvalTransform(mean=MEAN, std=STD, short_side=10)
    frame = dataset.frame(2, 1)
    assert frame["image"].shape == (3, 10, 15) and frame["label"] is None
    assert frame["name"] == "c/1"
    streamed = list(dataset.stream(2))
    assert [f["name"] for f in streamed] == ["c/0", "c/1", "c/2"]
    assert [f["label"] is None for f in streamed] == [False, True, False]
    assert streamed[2]["label"].shape == (20, 30)
    assert torch.equal(streamed[1]["image"], frame["image"])
    assert [f["name"] for f in dataset.stream(0, start=2)] == ["a/2", "a/3"]
    for bad in ((0, 4), (0, -1), (3, 0)):
        with pytest.raises(IndexError):
            dataset.frame(*bad)


def test_a_stream_reads_a_frame_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, read = Noise(), []
    original = dataset.read_frame
    monkeypatch.setattr(
        dataset, "read_frame", lambda v, f: (read.append((v, f)), original(v, f))[1]
    )
    list(islice(dataset.stream(0), 2))
    assert read == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("frame", "history", "past"),
    [(3, 2, [2, 1]), (1, 2, [0, 0]), (0, 2, [0, 0]), (2, 3, [1, 0, 0]), (3, 0, [])],
)
def test_the_past_is_the_latest_first_and_begins_with_frame_0(
    frame: int, history: int, past: list[int]
) -> None:
    dataset = Noise()
    assert dataset.past(0, frame, history) == past
    clip = ClipDataset(dataset, history=history)[frame]
    assert clip["past"].shape == (history, 3, 20, 30)
    torch.testing.assert_close(clip["image"], pixels_of(dataset, 0, frame))
    for got, number in zip(clip["past"], past, strict=True):
        torch.testing.assert_close(got, pixels_of(dataset, 0, number))


def test_frames_of_a_clip_may_have_gaps() -> None:
    assert Noise().past(0, 3, 3, 2) == [1, 0, 0]
    dataset = ClipDataset(
        Noise(), history=3, gap=2, transform=EvalTransform(mean=Noise.mean, std=Noise.std)
    )
    index = next(i for i in range(len(dataset)) if dataset.locate(i) == (0, 3))
    for got, number in zip(dataset[index]["past"], [1, 0, 0], strict=True):
        torch.testing.assert_close(got, pixels_of(Noise(), 0, number))
    with pytest.raises(ValueError, match="gap: expected at least 1, got 0"):
        ClipDataset(Noise(), gap=0)


def test_past_frames_may_lack_labels() -> None:
    clip = ClipDataset(Noise(), history=2)[6]
    assert clip["name"] == "c/2"
    torch.testing.assert_close(clip["past"][0], pixels_of(Noise(), 2, 1))


@pytest.mark.parametrize("rotation", [0, 30])
def test_one_augmentation_for_the_whole_clip(rotation: int) -> None:
    """Each frame is, bit for bit, what the transform gives of that frame alone."""
    clips = ClipDataset(Noise(), history=2)
    transform = TrainTransform(
        16, mean=MEAN, std=STD, seed=3, rotation=rotation, rotation_probability=1.0
    )
    clips.transform = transform
    for epoch in range(6):
        clips.set_epoch(epoch)
        for index in (1, 3):
            clip = clips[index]
            label = torch.from_numpy(Noise().read_frame(0, index)[1])
            frames = [index, *Noise().past(0, index, 2)]
            for got, number in zip([clip["image"], *clip["past"]], frames, strict=True):
                image = torch.from_numpy(Noise().read_frame(0, number)[0].transpose(2, 0, 1).copy())
                alone, same_label = transform(image, label, epoch=epoch, index=index)
                assert torch.equal(got, alone)
                assert torch.equal(clip["label"], same_label)


def test_augmentation_changes_with_the_epoch_and_nothing_else() -> None:
    clips = ClipDataset(Noise(), history=1)
    clips.transform = TrainTransform(16, mean=MEAN, std=STD, seed=3)
    first = clips[2]
    clips.set_epoch(1)
    assert not torch.equal(clips[2]["image"], first["image"])
    clips.set_epoch(0)
    again = clips[2]
    assert torch.equal(again["image"], first["image"]) and torch.equal(again["past"], first["past"])


def test_one_frame_of_each_video_per_epoch() -> None:
    clips = ClipDataset(Noise(), history=1, frames="one", seed=5)
    assert len(clips) == 3
    seen: list[set[int]] = [set(), set(), set()]
    for epoch in range(40):
        clips.set_epoch(epoch)
        for index in range(3):
            video, frame = clips.locate(index)
            assert video == index
            assert clips[index]["name"] == f"{'abc'[video]}/{frame}"
            seen[video].add(frame)
    assert seen == [{0, 1, 2, 3}, {0}, {0, 2}]  # labelled frames only
    other = ClipDataset(Noise(), frames="one", seed=6)
    drawn = []
    for dataset in (clips, other, ClipDataset(Noise(), frames="one", seed=5)):
        names = []
        for epoch in range(20):
            dataset.set_epoch(epoch)
            names.append(dataset.name(0))
        drawn.append(names)
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_choice_of_frames_is_not_the_augmentations_first_draw() -> None:
    """With one stream for both, a late frame would always come with a large scale."""
    place, scale = [], []
    clips = ClipDataset(Noise(), frames="one", seed=0)
    for epoch in range(300):
        clips.set_epoch(epoch)
        place.append(clips.locate(0)[1])
        scale.append(np.random.default_rng((0, epoch, 0)).uniform())
    assert abs(np.corrcoef(place, scale)[0, 1]) < 0.2


def test_a_video_without_labels_is_no_sample() -> None:
    class Bare(Noise):
        def labelled(self, video: int) -> Sequence[int]:
            return [] if video == 0 else super().labelled(video)

    clips = ClipDataset(Bare(), frames="one")
    assert [clips.locate(i)[0] for i in range(len(clips))] == [1, 2]
    assert len(ClipDataset(Bare())) == 3


def test_workers_and_the_loaders_carry_the_past() -> None:
    clips = ClipDataset(Noise(), history=2)
    alone = next(iter(DataLoader(clips, batch_size=7)))
    worked = list(DataLoader(clips, batch_size=2, num_workers=2))
    assert torch.equal(alone["past"], torch.cat([batch["past"] for batch in worked]))
    batch = next(training_loader(clips, batch_size=4, seed=0, epoch=0))
    assert batch["image"].shape == (4, 3, 3, 20, 30)
    (groups,) = evaluation_loader(clips, batch_size=7)
    *past, last = groups[0]["image"].unbind(1)  # a model's input: the earliest frame first
    assert torch.equal(torch.stack(past[::-1], 1), alone["past"])
    assert torch.equal(last, alone["image"])
    for images in (Noise(), ClipDataset(Noise(), history=0)):
        batch = next(training_loader(images, batch_size=4, seed=0, epoch=0))
        assert batch["image"].shape == (4, 3, 20, 30)


def test_frames_of_different_sizes() -> None:
    source = Noise()
    source.odd_size = True
    with pytest.raises(DataError, match=r"a/1: size 30x10, but a/2 has 30x20; the frames of a"):
        ClipDataset(source)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": -1}, "history: -1 is negative"),
        ({"seed": -1}, "seed: -1 is negative"),
        ({"frames": "some"}, "frames: expected 'all' or 'one', got 'some'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipDataset(Noise(), **arguments)


def test_a_frame_without_a_label_is_no_training_target() -> None:
    class Wrong(Noise):
        def labelled(self, video: int) -> Sequence[int]:
            return range(SIZES[video])

    with pytest.raises(DataError, match="c/1: has no label"):
        ClipDataset(Wrong())[6]
    with pytest.raises(DataError, match="c/1: has no label"):
        Wrong()[6]
