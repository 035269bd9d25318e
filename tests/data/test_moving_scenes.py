"""The moving scenes: random access, exact flow, and that degraded frames are told by the past."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcibi_fast.data import IGNORE_INDEX, MovingScenes, Scenes
from mcibi_fast.data.synthetic.moving_scenes import DEGRADATIONS
from mcibi_fast.data.synthetic.scenes import BOAT, CAR, PRESENCE, SCENE_TYPES
from mcibi_fast.metrics import DISFlow, warp_backward


def videos(**changes: object) -> MovingScenes:
    options: dict = {"count": 12, "length": 20, "size": 48, "seed": 1} | changes
    return MovingScenes(options.pop("split", "train"), **options)


def test_interface() -> None:
    dataset = videos(size=(32, 48), split="val")
    assert len(dataset.videos()) == 12 and dataset.frames(0) == 20 and len(dataset) == 240
    sample = dataset[21]
    assert sample["name"] == "val_00001_00001"
    assert sample["image"].shape == (3, 32, 48) and sample["image"].dtype == torch.float32
    assert sample["label"].shape == (32, 48) and sample["label"].dtype == torch.uint8
    still = Scenes("val", count=1, size=32, seed=0)
    assert dataset.classes == still.classes and dataset.mean == still.mean
    assert np.array_equal(dataset.palette, still.palette)


def test_a_frame_depends_on_seed_split_video_and_number_alone() -> None:
    dataset = videos()
    forwards = [dataset.read_frame(3, t) for t in range(20)]
    for t in reversed(range(20)):
        again = videos(count=99, length=50).read_frame(3, t)
        assert np.array_equal(forwards[t][0], again[0]) and np.array_equal(forwards[t][1], again[1])
    images = [image.tobytes() for image, _ in forwards]
    for other in (videos(seed=2), videos(split="val")):
        images += [other.read_frame(3, t)[0].tobytes() for t in range(20)]
    images += [dataset.read_frame(4, t)[0].tobytes() for t in range(20)]
    assert len(set(images)) == 80


@pytest.mark.parametrize("size", [(16, 16), (17, 61), (61, 17), (96, 96), (120, 200)])
def test_every_size_is_drawn_and_labelled(size: tuple[int, int]) -> None:
    dataset = videos(size=size)
    for video in range(12):
        image, label = dataset.read_frame(video, video)
        assert image.shape == (*size, 3) and image.dtype == label.dtype == np.uint8
        assert label[label != IGNORE_INDEX].max() < 12
        assert (label == IGNORE_INDEX).mean() < 0.25


def test_all_types_occur_and_hold_their_classes() -> None:
    dataset = videos(count=60)
    kinds = [dataset.scene_type(v) for v in range(60)]
    assert set(kinds) == set(SCENE_TYPES)
    for video, kind in enumerate(kinds):
        found = set(np.unique(dataset.read_frame(video, 5)[1]).tolist()) - {IGNORE_INDEX}
        assert all(PRESENCE[kind][c] > 0 for c in found), (kind, found)


def agreement(dataset: MovingScenes, video: int, frame: int, flow: np.ndarray) -> float:
    """Share of pixels inside their region whose class the flow finds again.

    At a region's border rounding to the nearest pixel may change sides; the picture's rim may have
    left it.
    """
    here, there = (torch.from_numpy(dataset.read_frame(video, t)[1]) for t in (frame, frame + 1))
    warped = warp_backward(there, torch.from_numpy(flow), "strict")
    around = here.float()[None, None]
    low, high = -F.max_pool2d(-around, 3, 1, 1)[0, 0], F.max_pool2d(around, 3, 1, 1)[0, 0]
    inside = (low == high) & (here != IGNORE_INDEX) & (warped != IGNORE_INDEX)
    inside[:8], inside[-8:], inside[:, :8], inside[:, -8:] = False, False, False, False
    return float((here == warped)[inside].double().mean())


def test_the_flow_is_exact() -> None:
    """Warped by it, labels agree but for what is about to be covered; not without it."""
    dataset = videos(count=20, length=60, size=160)
    with_flow, without = [], []
    for video in range(20):
        flow = dataset.flow(video, 2 * video)
        assert flow.shape == (2, 160, 160) and flow.dtype == np.float32
        with_flow.append(agreement(dataset, video, 2 * video, flow))
        without.append(agreement(dataset, video, 2 * video, np.zeros_like(flow)))
    assert np.median(with_flow) == 1.0 > np.median(without)
    assert 1 - np.mean(with_flow) < 0.4 * (1 - np.mean(without))


def test_an_estimated_flow_agrees() -> None:
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    dataset, estimate = videos(count=10, length=60, size=160, degraded=0.0), DISFlow()
    errors, lengths = [], []
    for video in range(10):
        exact = torch.from_numpy(dataset.flow(video, 2 * video))
        first, second = (
            torch.from_numpy(dataset.read_frame(video, 2 * video + i)[0]).permute(2, 0, 1)
            for i in (0, 1)
        )
        errors.append(float((estimate(first, second) - exact).norm(dim=0).median()))
        lengths.append(float(exact.norm(dim=0).median()))
    assert np.mean(errors) < 0.25 * np.mean(lengths)


def test_the_flow_predicts_the_next_frames_colours() -> None:
    """Where textures are concerned, too: clear frames, but for grain and light."""
    dataset = videos(count=6, size=96, degraded=0.0)
    for video in range(6):
        here, there = (dataset.read_frame(video, t)[0].astype(int) for t in (4, 5))
        flow = torch.from_numpy(dataset.flow(video, 4))
        back = [
            warp_backward(torch.from_numpy(there[..., c]), flow, "strict").numpy() for c in range(3)
        ]
        error = np.abs(np.stack(back, -1) - here)[8:-8, 8:-8]
        assert np.median(error) <= 6 and (error < 40).mean() > 0.95


def test_moving_things_have_a_flow_of_their_own() -> None:
    dataset = videos(count=40, size=64)
    differ = 0
    for video in range(40):
        label, flow = dataset.read_frame(video, 3)[1], dataset.flow(video, 3)
        movers = np.isin(label, (BOAT, CAR))
        if movers.sum() > 30:
            ground = np.median(flow[0][~movers & (label != IGNORE_INDEX)])
            differ += abs(np.median(flow[0][movers]) - ground) > 0.2
    assert differ >= 8


def test_the_last_frame_has_no_flow() -> None:
    with pytest.raises(IndexError, match="frame 20 of a video with 20 frames"):
        videos().flow(0, 19)


def test_things_cover_one_another_and_leave_the_picture() -> None:
    """The pixels of boats and cars come and go over a video."""
    dataset = videos(count=30, length=60, degraded=0.0)
    gone = 0
    for video in range(30):
        sizes = [
            np.isin(dataset.read_frame(video, t)[1], (BOAT, CAR)).sum() for t in range(0, 60, 10)
        ]
        gone += max(sizes) > 20 and min(sizes) < 0.3 * max(sizes)
    assert gone >= 4


def test_degraded_frames_keep_their_labels_and_lose_their_looks() -> None:
    dataset, clear = videos(count=30), videos(count=30, degraded=0.0)
    kinds = []
    for video in range(30):
        assert dataset.degradation(video, 0) is None
        for frame in (0, 7, 13):
            found = dataset.degradation(video, frame)
            image, label = dataset.read_frame(video, frame)
            bare, same = clear.read_frame(video, frame)
            assert np.array_equal(label, same)
            if found is None:
                assert np.array_equal(image, bare)
            else:
                kinds.append(found.kind)
                assert np.abs(image.astype(int) - bare).max() > 15
    assert set(kinds) == set(DEGRADATIONS)


def test_the_share_of_degraded_frames() -> None:
    dataset = videos(count=40, length=50, degraded=0.35)
    share = np.mean(
        [dataset.degradation(v, t) is not None for v in range(40) for t in range(1, 50)]
    )
    assert share == pytest.approx(0.35, abs=0.03)


def test_the_past_frame_shows_what_a_degraded_one_hides() -> None:
    """Warped by the exact flow, the frame before is closer to the clear picture than the degraded
    frame is."""
    dataset, clear = videos(count=30, size=64), videos(count=30, size=64, degraded=0.0)
    better, total = 0, 0
    for video in range(30):
        for frame in range(1, 8):
            if dataset.degradation(video, frame) is None or dataset.degradation(video, frame - 1):
                continue
            degraded, bare = (d.read_frame(video, frame)[0].astype(int) for d in (dataset, clear))
            before = dataset.read_frame(video, frame - 1)[0].astype(int)
            hidden = np.abs(degraded - bare).max(-1) > 40
            if hidden.sum() < 50:
                continue
            total += 1
            better += np.abs(before - bare)[hidden].mean() < np.abs(degraded - bare)[hidden].mean()
    assert total >= 15 and better / total > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split: 'dev' is not one of train, val, test"),
        ({"count": 0}, "count: 0, expected at least 1"),
        ({"length": 0}, "length: 0, expected at least 1"),
        ({"size": 8}, "size: 8x8 is too small"),
        ({"seed": -1}, "seed: -1 is negative"),
        ({"degraded": 1.5}, r"degraded: 1.5 is not in 0..1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        videos(**arguments)
