"""Evaluation over videos, and training on clips."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mcibi_fast import models, ops
from mcibi_fast.data import ClipDataset, DataError, MovingScenes
from mcibi_fast.data.video import VideoDataset
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.evaluate_video import evaluate_videos
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.inference.stream import VideoPredictor
from mcibi_fast.metrics import ConfusionMatrix, VideoMetrics
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes import InferenceConfig, MovingScenesData
from mcibi_fast.training.train import train

SIZE = (32, 40)


class Blocks(VideoDataset):
    """Videos of 3, 1 and 4 frames of coloured blocks; the second frame of each has no label."""

    classes = ("a", "b", "c")
    palette = np.eye(3, dtype=np.uint8) * 255
    mean = std = (0.5, 0.5, 0.5)
    lengths = (3, 1, 4)

    def videos(self):
        return [f"video{i}" for i in range(len(self.lengths))]

    def frames(self, video):
        return self.lengths[video]

    def labelled(self, video):
        return [f for f in range(self.lengths[video]) if f != 1]

    def frame_name(self, video, frame):
        return f"{video}_{frame}"

    def read_frame(self, video, frame):
        rng = np.random.default_rng((video, frame))
        label = rng.integers(3, size=(4, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = rng.integers(60, size=(*SIZE, 3)) + 60 * label[..., None]
        return image.astype(np.uint8), None if frame == 1 else label


class Broken(Blocks):
    def read_frame(self, video, frame):
        if (video, frame) == (2, 1):
            raise DataError("2_1: no image")
        return super().read_frame(video, frame)


def small(name="fcn_video_mcibipp", classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(
            name, classes, "test_resnet", feats_channels=8, transform_channels=8, form="paper"
        )
        model.memory.memory.normal_(0.5, 0.5)
        model.head.context.weight_head.classifier.weight.data.mul_(20)
    return model.eval()


@torch.no_grad()
def test_as_by_clips():
    """One pass over each frame counts what a pass over each clip does; so does `evaluate`."""
    model, clips = small(), ClipDataset(Blocks(), history=2)
    streamed = evaluate_videos(model.train(), clips).confusion
    assert model.training, "the mode is put back"
    assert torch.equal(evaluate(model, clips, batch_size=2).matrix, streamed.matrix)
    expected = ConfusionMatrix(3)
    for clip in clips:
        images = torch.cat([clip["past"].flip(0), clip["image"][None]])
        logits = model.eval()(images[None]).logits
        expected.update(ops.upsample_argmax(logits, SIZE)[0], clip["label"])
    assert streamed.matrix.sum() == expected.matrix.sum() == 6 * SIZE[0] * SIZE[1]
    assert (streamed.matrix - expected.matrix).abs().sum() <= 4, "more than near ties"


class Recorder:
    """In place of a model: keeps what it is called with, answers with given logits or none."""

    needs_labels = False

    def __init__(self, head, answers=None):
        self.head, self.calls, self.answers = head, [], answers

    def __call__(self, images, **options):
        self.calls.append(images)
        size = [s // 8 for s in images.shape[2:]]
        logits = images.new_zeros(1, 3, *size) if self.answers is None else self.answers.pop(0)
        return models.SegmentationOutput(logits, {})


@torch.no_grad()
def test_every_view_and_window_has_a_past_of_its_own(generator):
    model = small().double()
    inference = InferenceConfig(
        scales=(1.0, 1.5), flip=True, window=(24, 32), stride=(16, 16), stages=2
    )
    frames = torch.randn(4, 3, *SIZE, generator=generator, dtype=torch.float64)
    recorded = []
    for frame in frames:
        recorder = Recorder(model.head)
        predict_labels(recorder, frame[None], SIZE, inference)
        recorded.append(recorder.calls)
    predictor = VideoPredictor(model, inference)
    for N, frame in enumerate(frames):
        answers = [
            model(torch.stack([recorded[max(N - i, 0)][k] for i in (2, 1, 0)], 1), stages=2).logits
            for k in range(len(recorded[0]))
        ]
        assert len(answers) > 8
        replayer = Recorder(model.head, answers)
        expected = predict_labels(replayer, frame[None], SIZE, inference)[0]
        assert torch.equal(predictor.predict(frame, SIZE), expected)
    with pytest.raises(ValueError, match="the frames of a video have one size"):
        predictor.predict(frames[0, :, :24], SIZE)


@pytest.mark.parametrize("name", ["fcn_video_mcibipp", "fcn_mcibipp"])
@torch.no_grad()
def test_scores_by_hand(name):
    """The model on each video's clips, the predictions into the metrics one by one."""
    data = MovingScenes("val", count=2, length=5, size=SIZE, seed=0)
    model = small(name, len(data.classes))
    got = evaluate_videos(model, data, protocol="strict", windows=(2, 4), flow="given")
    metrics = VideoMetrics(len(data.classes), protocol="strict", windows=(2, 4), flow="given")
    for video in range(2):
        metrics.start(video)
        frames = [data.frame(video, f) for f in range(5)]
        for N, frame in enumerate(frames):
            images = frame["image"]
            if name == "fcn_video_mcibipp":
                images = torch.stack([frames[max(N - i, 0)]["image"] for i in (2, 1, 0)])
            logits = model(images[None]).logits
            full = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear")
            flow = torch.from_numpy(data.flow(video, N - 1)) if N else None
            metrics.update(full[0].argmax(0), frame["label"], flow=flow)
    expected = metrics.compute().as_dict()
    scores = got.compute().as_dict()
    assert scores.keys() == expected.keys() and scores["protocol"] == "strict"
    assert scores["tc_pairs"] == 8 and scores["vc4_windows"] == expected["vc4_windows"]
    for key in ("mean_iou", "pixel_accuracy", "mean_class_accuracy", "tc", "vc2", "vc4"):
        assert scores[key] == pytest.approx(expected[key], abs=2e-3)


def test_ranks_share_whole_videos():
    model, data = small(), Blocks()
    whole = evaluate_videos(model, data, windows=(2,))
    parts = [
        evaluate_videos(
            model,
            data,
            windows=(2,),
            accelerator=SimpleNamespace(
                process_index=rank,
                num_processes=2,
                device=torch.device("cpu"),
                autocast=nullcontext,
            ),
        )
        for rank in range(2)
    ]
    together = sum(part.confusion.matrix for part in parts)
    assert torch.equal(together, whole.confusion.matrix)
    pixels = SIZE[0] * SIZE[1]
    # Videos 0 and 2 have 2 and 3 labelled frames, video 1 has 1.
    assert [int(p.confusion.matrix.sum()) for p in parts] == [5 * pixels, pixels]


def test_the_models_precision_is_not_the_flows():
    """Under autocast the model computes in bfloat16, the estimated flow does not."""
    seen = []

    class Flow:
        name = "a product"

        def __call__(self, first, second):
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return torch.zeros(2, *first.shape[1:])

    model = small()
    model.register_forward_hook(lambda *_: seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype))
    here = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )  # fmt: skip
    evaluate_videos(model, Blocks(), flow=Flow(), accelerator=here)
    assert set(seen) == {torch.float32} and len(seen) > 2


def test_workers_change_nothing():
    model = small()
    alone, worked = (evaluate_videos(model, Blocks(), workers=n) for n in (0, 1))
    assert torch.equal(alone.confusion.matrix, worked.confusion.matrix)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_frame_is_named(workers):
    with pytest.raises(DataError, match=r"^2_1: no image$"):
        evaluate_videos(small(), Broken(), workers=workers)


def test_errors():
    with pytest.raises(ValueError, match="flow: Blocks does not provide it"):
        evaluate_videos(small(), Blocks(), flow="given")
    with pytest.raises(ValueError, match="protocol"):
        evaluate_videos(small(), Blocks(), protocol="vspw")
    with pytest.raises(ValueError, match=r"^0_0: "):
        evaluate_videos(small(classes=5), Blocks())
    with pytest.raises(KeyboardInterrupt):
        evaluate_videos(small(), Blocks(), interrupted=lambda: True)


@pytest.mark.slow
def test_training_on_clips(tiny_config, tmp_path):
    """The trainer as it is: clips in, the memory initialised, evaluated, saved; from an image."""
    size = (40, 44)
    config = tiny_config()
    config.data = MovingScenesData(train_count=5, val_count=2, size=size, length=4, history=0)
    config.model.name = "fcn_mcibipp"
    image = train(config, tmp_path / "image", progress=False)
    config.data.history = 2
    config.model.name = "fcn_video_mcibipp"
    config.model.options |= {"pretrained": str(tmp_path / "image")}
    result = train(config, tmp_path / "video", progress=False)
    assert result.steps == image.steps == 2
    assert 0 <= result.metrics["mean_iou"] <= 1
    model, _ = load_model(tmp_path / "video")
    past = model.head.context.fuse.conv[0].weight[:, 8:-8]
    assert past.count_nonzero() == past.numel(), "past frames' part of F_T has learnt nothing"
    config.data.history = 1
    with pytest.raises(ValueError, match="the data must have the same history as the model"):
        train(config, tmp_path / "other", progress=False)
