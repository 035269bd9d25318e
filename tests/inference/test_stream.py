"""Streaming: equal to clips, each frame once, memory that does not grow."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.inference.stream import VideoStream
from mcibi_fast.models.counting import count

K, SIZE = 5, (32, 48)
FAMILIES = ["upernet_video_mcibipp", "upernet_video_mcibi", "fcn_video_mcibipp"]


def small(name="upernet_video_mcibipp", **options):
    options = {"feats_channels": 8, "transform_channels": 8, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(name, K, "test_resnet", **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.bias.data.normal_(0, 0.2)
        model.memory.memory.normal_(0.5, 0.5)
        model.head.context.weight_head.classifier.weight.data.mul_(20)  # W differs between frames
        if model.head.within_image_head is not None:
            model.head.within_image_head.classifier.weight.data.mul_(20)
    return model.double().eval()


def video(generator, length, batch=1):
    return torch.randn(length, batch, 3, *SIZE, generator=generator, dtype=torch.float64)


@torch.no_grad()
def by_clips(model, frames, **options):
    """Each frame with the h before it, the first one repeated."""
    h, results = model.history, []
    for N in range(len(frames)):
        clip = torch.stack([frames[max(N - i, 0)] for i in range(h, -1, -1)], dim=1)
        results.append(model(clip, **options).logits)
    return results


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("options", [{}, {"form": "paper"}, {"form": "paper", "past": "features"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_clips(name, options, fold, generator):
    model = small(name, history=3, **options)
    frames = video(generator, 6, batch=2)
    stream = VideoStream(model.fold() if fold else model, stages=2)
    expected = by_clips(model, frames, stages=2)
    for got, wanted in zip(map(stream, frames), expected, strict=True):
        assert (got.logits - wanted).abs().max() < 1e-13 * wanted.abs().max() + 1e-14


def test_past_frames_matter(generator):
    model, frames = small(), video(generator, 3)
    stream = VideoStream(model)
    last = [stream(frame) for frame in frames][-1].logits
    assert (last - model(frames[-1]).logits).abs().max() > 1e-6


def test_reset_begins_another_video(generator):
    model = small()
    first, second = video(generator, 3), video(generator, 3)[..., :40]
    stream = VideoStream(model)
    for frame in first:
        stream(frame)
    with pytest.raises(ValueError, match=r"reset\(\) when another video begins"):
        stream(second[0])
    stream.reset()
    fresh = VideoStream(model)
    for frame in second:
        assert torch.equal(stream(frame).logits, fresh(frame).logits)


def test_each_frame_is_computed_once(generator):
    model, calls = small(), []
    model.backbone.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    model.head.context.weight_head.register_forward_hook(lambda *args: calls.append("W"))
    model.head.context.attention.output.register_forward_hook(lambda *args: calls.append("C_bi"))
    stream = VideoStream(model)
    for frame in video(generator, 4):
        stream(frame)
    assert calls == [1, "W", "C_bi"] * 4


@pytest.mark.slow
def test_memory_does_not_grow(generator):
    stream = VideoStream(small())
    frames = video(generator, 30)
    references, held, addresses = [], set(), set()
    for i, frame in enumerate(frames.unbind()):
        frame = frame.clone()
        output = stream(frame)
        references += [weakref.ref(frame), weakref.ref(output.logits)]
        del frame, output
        if i in (3, 29):
            gc.collect()
            addresses.add(stream._rings[0].data_ptr())
            held.add(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))
    assert stream.nbytes == 2 * 8 * 4 * 6 * 8  # h maps of Z channels at stride 8 in float64
    assert all(reference() is None for reference in references)
    assert len(held) == len(addresses) == 1


def test_an_image_model_takes_each_frame_by_itself(generator):
    model = small("fcn_mcibipp")
    stream = VideoStream(model, stages=2)
    for frame in video(generator, 3):
        with torch.no_grad():
            assert torch.equal(stream(frame).logits, model(frame, stages=2).logits)
    assert stream.nbytes == 0


def test_a_frame_that_fails_leaves_the_past_alone(generator):
    model = small()
    stream, other = VideoStream(model), VideoStream(model)
    frames = video(generator, 3)
    for s in (stream, other):
        s(frames[0])
        s(frames[1])
    with pytest.raises(ValueError, match="images"):
        stream(frames[2].to(torch.uint8))
    assert torch.equal(stream(frames[2]).logits, other(frames[2]).logits)


def test_training_mode_is_refused(generator):
    with pytest.raises(RuntimeError, match="training mode"):
        VideoStream(small().train())(video(generator, 1)[0])


class Step(nn.Module):
    """A stream in its steady state, for counting."""

    def __init__(self, model):
        super().__init__()
        self.model, self.stream = model, VideoStream(model)

    def forward(self, frames):
        return self.stream(frames)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["upernet", "fcn"])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_frame_costs_at_most_1_15_of_an_image(framework, form):
    """By multiply-adds, with two past frames."""
    with torch.device("meta"):
        image = torch.empty(1, 3, 512, 512)
        options = {"form": form, "auxiliary_weight": 0.0, "noise": "fixed"}
        single = models.create(f"{framework}_mcibipp", 124, "resnet50", **options).eval()
        step = Step(models.create(f"{framework}_video_mcibipp", 124, "resnet50", **options)).eval()
        step(image)
        ratio = count(step, image).true / count(single, image).true
    assert 1.01 < ratio <= 1.15
