"""Figure 8: which frames it shows, what is under them, and that predictions are the model's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mcibi_fast import models, ops
from mcibi_fast.data import ClipDataset, MovingScenes
from mcibi_fast.models import Segmentor
from mcibi_fast.reports import video_strip
from mcibi_fast.reports.gathering import collect, gather, model_input
from mcibi_fast.reports.video_strip import (
    flips,
    follow,
    middle_frames,
    read_scenes,
    video_sheet,
    videos_to_show,
)

PALETTE = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 250]], np.uint8)


def clips(history: int = 0, length: int = 12) -> ClipDataset:
    source = MovingScenes("val", count=3, length=length, size=(32, 40), seed=0)
    return ClipDataset(source, history=history)


def make(name: str, **options: object) -> Segmentor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(name, 12, "test_resnet", feats_channels=8, **options)
        if "mcibipp" in name:
            model.memory.memory.normal_(0.5, 0.5)
            model.head.context.weight_head.classifier.weight.data.mul_(20)
    return model.eval()


def video_model(**options: object) -> Segmentor:
    return make("upernet_video_mcibipp", transform_channels=8, **options)


def test_frames_are_in_the_middle_of_videos_a_third_and_two_thirds_through() -> None:
    assert videos_to_show(clips()) == [1, 2]
    one = MovingScenes("val", count=1, length=2, size=16, seed=0)
    assert videos_to_show(one) == [0]
    assert middle_frames(clips(), 0, 6) == middle_frames(clips(2).source, 2, 6) == range(3, 9)
    assert middle_frames(clips(length=4), 0, 6) == range(4)
    assert middle_frames(clips(), 1, 5) == range(3, 8)


@pytest.mark.parametrize("frames", [range(2), range(1, 3), range(7, 10)])
@pytest.mark.parametrize("history", [1, 3])
def test_a_video_model_is_followed_as_from_the_beginning(history: int, frames: range) -> None:
    model, dataset = video_model(history=history), clips(history)
    found = follow(model, dataset, 2, frames)
    for frame, prediction in zip(frames, found, strict=True):
        clip = model_input(model, dataset, 2 * 12 + frame)
        assert clip.shape == (1, history + 1, 3, 32, 40)
        with torch.no_grad():
            expected = ops.upsample_argmax(model(clip).logits, (32, 40))[0]
        assert (expected.numpy() != prediction).mean() < 0.005, "more than near ties"
    alone = follow(make("upernet"), dataset, 2, frames)
    assert len(alone) == len(frames) and alone[0].shape == (32, 40)


@pytest.mark.parametrize("past", ["context", "features"])
def test_gathering_of_a_video_model_is_of_its_last_frame(past: str) -> None:
    model = video_model(history=2, past=past)
    clip = model_input(model, clips(), 7)
    seen = gather(model, clip, stages=2)
    with torch.no_grad():
        expected = model(clip, stages=2)
        R = model.pixel_representations(clip)
    assert torch.equal(seen.output.logits, expected.logits)
    assert torch.allclose(seen.features, R, atol=1e-5)  # one frame or all in a batch
    first, second = seen.weight_logits
    assert torch.equal(first, expected.context_logits)  # weights_from="cwi"
    assert first.shape == second.shape and not torch.equal(first, second)
    assert len(seen.augmented) == 2 and seen.augmented[0].shape == R.shape
    # Past frames count, and are read of a dataset of single frames, too.
    assert not torch.equal(seen.augmented[0], gather(model, clip[:, -1]).augmented[0])
    collected = collect(model, clips(), [7])
    assert collected.R_aug is not None
    assert np.array_equal(collected.R_aug, collect(model, clips(2), [7]).R_aug)


def test_flips_are_of_pixels_whose_label_stays() -> None:
    labels = [np.array([[0, 0, 1, 255]]), np.array([[0, 0, 2, 255]])]
    predictions = [np.array([[0, 1, 1, 1]]), np.array([[0, 0, 2, 2]])]
    assert flips(predictions, labels, 3) == 0.5
    assert np.isnan(flips(predictions, [labels[0] * 0 + 255] * 2, 3))


def test_the_sheet_has_a_row_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.zeros((32, 40), np.uint8)
    label[16:] = 1
    unlabelled = np.full_like(label, 255)
    scenes = [
        video_strip.Scene(f"frame {i}", np.full((32, 40, 3), 127, np.uint8), shown)
        for i, shown in enumerate((label, label, unlabelled))
    ]
    half = label * 0
    seen: dict = {}
    grid = video_strip.grid
    monkeypatch.setattr(
        video_strip, "grid", lambda rows, **o: seen.update(o, rows=rows) or grid(rows, **o)
    )
    names = {"UPerNet + MCIBI++": [label, half, half], "UPerNet + Video-MCIBI++": [label] * 3}
    sheet = video_sheet(scenes, names, ["a", "b", "c"], PALETTE)
    assert sheet.width > 3 * 200 and len(seen["rows"]) == 4
    assert seen["columns"] == ["", "frame 0", "frame 1", "frame 2"]
    assert seen["notes"][2] == ["", "100.0 % right", "50.0 % right, 50.0 % flip", "no label"]
    assert seen["notes"][3] == ["", "100.0 % right", "100.0 % right, 0.0 % flip", "no label"]
    ink = [int((row[2] == (40, 42, 48)).all(-1).sum()) for row in seen["rows"]]
    assert ink[2] > 0 and ink[0] == ink[1] == ink[3] == 0


def test_scenes_of_frames_without_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = clips()
    read = MovingScenes.read_frame
    monkeypatch.setattr(
        MovingScenes,
        "read_frame",
        lambda self, video, frame: (
            (read(self, video, frame)[0], None) if frame == 3 else read(self, video, frame)
        ),
    )
    third, fourth = read_scenes(dataset, 0, [3, 4])
    assert third.name == "frame 3" and (third.label == 255).all() and third.label.shape == (32, 40)
    assert (fourth.label != 255).any()
