"""ETC, NetWarp and TCB: their equations, clips and streams, and what they are combined from."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.data import ClipDataset, EvalTransform, MovingScenes
from mcibi_fast.inference.export import EvaluationForm
from mcibi_fast.inference.stream import VideoStream
from mcibi_fast.metrics import RAFTFlow
from mcibi_fast.models import VideoSegmentor, flow, load_image_weights
from mcibi_fast.models.flow import Frames
from mcibi_fast.models.outline import outline
from mcibi_fast.models.overview import video_overview
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.nn.warp import warp
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.recipes.registry import configure
from mcibi_fast.reports.gathering import gather, model_input
from tests.models.disturbed import disturb

K, SIZE = 5, (32, 48)
PEERS = [f"{name}_{method}" for name in ("pspnet", "ocrnet") for method in models.video_methods()]


def small(generator: torch.Generator, name: str, **options: object) -> VideoSegmentor:
    """In float64; NetWarp's weights of the frame before are not 0."""
    options = {"feats_channels": 8, "dropout": 0.0, **options}
    if name.startswith("ocrnet"):
        options["transform_channels"] = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(name, K, "test_resnet", **options)
    disturb(model, generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, models.netwarp.Mixture):
                module.previous.uniform_(0.2, 1, generator=generator)
    return model.double().eval()


def moving(generator: torch.Generator, frames: int, batch: int = 1) -> Tensor:
    """(frames, batch, 3, *SIZE): a texture that moves to the left, and noise."""
    wide = torch.rand(batch, 3, SIZE[0] // 4, SIZE[1] // 4 + frames, generator=generator)
    wide = nn.functional.interpolate(wide, scale_factor=4, mode="bilinear")
    shown = [wide[..., 2 * i : 2 * i + SIZE[1]] for i in range(frames)]
    noise = torch.rand(frames, batch, 3, *SIZE, generator=generator)
    return (torch.stack(shown) + 0.1 * noise).double()


@pytest.mark.parametrize("name", [*PEERS, "upernet_etc_mcibipp", "ocrnet_tcb memory"])
@torch.no_grad()
def test_a_stream_is_equal_to_clips(name: str, generator: torch.Generator) -> None:
    name, memory, _ = (*name.split(), "", "")[:3]
    model = small(
        generator, name, **({"memory_frames": 4} if memory else {"gap": 2} if "tcb" in name else {})
    )
    video = moving(generator, 10, batch=2)
    stream, offsets = VideoStream(model), list(model.head.offsets)
    expected = {"etc": [], "netwarp": [1], "tcb": [4, 3, 2, 1] if memory else [6, 4, 2]}
    assert offsets == expected[name.split("_")[1]] and model.reach == max(offsets, default=0)
    for N, frame in enumerate(video):
        clip = torch.stack([video[max(N - offset, 0)] for offset in (*offsets, 0)], dim=1)
        wanted = model(clip).logits
        assert (stream(frame).logits - wanted).abs().max() < 1e-12 * wanted.abs().max()
        if N > 6:  # what matters is those frames and no others
            assert torch.equal(model(frame).logits, wanted) == (not offsets)
    still = video[:1].expand(model.reach + 1, -1, -1, -1, -1)
    stream.reset()
    for frame in still:
        last = stream(frame).logits
    torch.testing.assert_close(last, model(still[0]).logits, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*PEERS, "upernet_etc_mcibipp"])
def test_a_training_step(name: str, generator: torch.Generator) -> None:
    model = small(generator, name).train()
    clip = moving(generator, model.history + 1, batch=2).transpose(0, 1).requires_grad_()
    labels = torch.randint(0, K, (2, *SIZE), generator=generator)
    losses = model(clip, labels).losses
    terms = {"loss_cls", "loss_aux"} | ({"loss_consistency"} if "etc" in name else set())
    assert terms <= losses.keys() and (losses.keys() == terms or "mcibipp" in name)
    torch.stack(list(losses.values())).sum().backward()
    assert (clip.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all(), "a frame without a gradient"
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in without if not n.startswith("backbone")]


def test_inconsistency_by_hand(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published formula with a flow that is known."""
    model = small(generator, "pspnet_etc").train()
    previous, current = torch.randn(2, 2, 3, *SIZE, generator=generator, dtype=torch.float64)
    asked = []

    def known(self: Frames, others: Tensor, name: str) -> Tensor:
        asked.append((self.images, others, name))
        field = torch.zeros(2, 2, *SIZE, dtype=torch.float64)
        field[:, 0] = 3.0
        return field

    monkeypatch.setattr(Frames, "flow_to", known)
    before, now = torch.randn(2, 2, K, *SIZE, generator=generator, dtype=torch.float64)
    loss = model.head.inconsistency(now, before, Frames(torch.cat([previous, current])))
    ((first, second, name),) = asked
    assert torch.equal(first, current) and torch.equal(second, previous) and name == "dis"

    def shifted(maps: Tensor) -> Tensor:
        return torch.cat([maps[..., 3:], torch.zeros_like(maps[..., :3])], dim=-1)

    m = torch.exp(-(current - shifted(previous)).sum(1).abs())[:, None]
    expected = ((m * now - m * shifted(before)) ** 2).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_etc_sees_no_difference_between_equal_frames(generator: torch.Generator) -> None:
    model = small(generator, "fcn_etc", consistency_weight=3.0).train()
    frame = moving(generator, 1, batch=2)[0]
    labels = torch.randint(0, K, (2, *SIZE), generator=generator)
    losses = model(torch.stack([frame, frame], dim=1), labels).losses
    assert losses["loss_consistency"] < 1e-10
    pair = torch.stack([frame.flip(3), frame], dim=1)
    assert model(pair, labels).losses["loss_consistency"] > 1e-4
    image = copy.deepcopy(model).head
    logits = image.eval()(model.eval().backbone(frame)).logits
    assert torch.equal(model(pair).logits, logits)  # in evaluation the frame before has no effect


@torch.no_grad()
def test_netwarp_mixes_what_lies_under_the_motion(generator: torch.Generator) -> None:
    mixture = models.netwarp.Mixture(3).double()
    mixture.previous.fill_(0.5)
    now, before = torch.randn(2, 1, 3, 4, 6, generator=generator, dtype=torch.float64)
    motion = torch.full((1, 2, 32, 48), 8.0, dtype=torch.float64)  # one pixel of the maps
    expected = now + 0.5 * warp(before, torch.ones(1, 2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(mixture(now, before, motion), expected)


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_it_starts_from_an_image_model(
    name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    image = small(generator, name.split("_")[0]).float()
    spec = ModelSpec(name, "test_resnet", {}, list("abcde"), [[0, 0, 0]] * K, [0.0] * 3, [1.0] * 3)
    (tmp_path / "model.safetensors").write_bytes(pack_weights(image, spec))
    video = small(generator, name).float()
    for module in video.modules():
        if isinstance(module, models.netwarp.Mixture):
            module.reset_parameters()
    load_image_weights(video, tmp_path)
    frames = moving(generator, len(video.head.offsets) + 1).float().transpose(0, 1)
    if "tcb" in name:  # the mean over equal frames
        frames = frames[:, -1:].expand_as(frames)
    torch.testing.assert_close(video(frames).logits, image(frames[:, -1]).logits)


def test_parameters_are_the_published_ones() -> None:
    """Of the decoders of VSPW's baselines, 124 classes. Ours have no convolution that is not used
    (ETC and NetWarp on PSPNet), and NetWarp's last convolution has biases instead of a batch norm.
    """
    published = {"pspnet_tcb": 27_920_632, "pspnet_etc": 46_796_024, "pspnet_netwarp": 46_815_256}
    unused = 4096 * 512 * 9 + 2 * 512
    for name, wanted in published.items():
        model = outline(lambda name=name: models.create(name, 124, "resnet101"), 10**6)
        own = sum(p.numel() for p in model.head.parameters())
        wanted -= unused if name != "pspnet_tcb" else 0
        assert own == wanted - (2 if name == "pspnet_netwarp" else 0)


def test_flow_is_estimated_on_the_frames_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256)
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.1)
    seen = []

    def estimate(first: Tensor, second: Tensor) -> Tensor:
        seen.extend([first, second])
        return torch.zeros(2, *first.shape[1:])

    monkeypatch.setattr(flow, "estimator", lambda name, device: estimate)
    images = (colours / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    Frames(images, (mean, std)).flow_to(images.flip(3), "raft")
    assert torch.equal(seen[0], colours[0]) and torch.equal(seen[1], colours[0].flip(2))


def test_the_estimators() -> None:
    assert "DIS" in flow.estimator("dis", "cpu").name
    with pytest.raises(ValueError, match="flow: expected 'dis' or 'raft', got 'lk'"):
        flow.estimator("lk", "cpu")


def test_flow_is_not_exported(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="export: PSPNetNetWarpHead estimates optical flow"):
        EvaluationForm(small(generator, "pspnet_netwarp"), fold=False)
    for name in ("pspnet_etc", "ocrnet_tcb"):
        model = small(generator, name)
        images = moving(generator, 1)[0]
        with torch.no_grad():
            logits, _ = EvaluationForm(model, fold=False)(images)
            assert torch.equal(logits, model(images).logits)


@pytest.mark.parametrize("name", ["pspnet_tcb", "fcn_etc"])
def test_reports_give_each_model_its_own_clips(name: str, generator: torch.Generator) -> None:
    videos = MovingScenes("val", count=1, length=8, size=SIZE, seed=0)
    videos.transform = EvalTransform(mean=videos.mean, std=videos.std)
    data = ClipDataset(videos, history=1, transform=videos.transform)
    model = small(generator, name).float()
    clip = model_input(model, data, 7)
    frames = [max(7 - offset, 0) for offset in (*model.head.offsets, 0)]
    assert clip.shape[:2] == (1, len(frames))
    for got, frame in zip(clip[0], frames, strict=True):
        torch.testing.assert_close(got, videos.frame(0, frame)["image"])
    seen = gather(model, clip)
    with torch.no_grad():
        assert torch.equal(seen.output.logits, model(clip).logits)
    assert seen.features.shape[:2] == (1, 8)


@pytest.mark.slow
def test_flow_by_raft(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, as nothing can be downloaded."""
    from torchvision.models.optical_flow import raft_large

    torch.save(raft_large(weights=None).state_dict(), tmp_path / "raft.pth")
    raft = RAFTFlow(tmp_path / "raft.pth", iterations=1)
    monkeypatch.setattr(flow, "estimator", lambda name, device: raft)
    model = small(generator, "ocrnet_netwarp", flow="raft").float()
    clip = torch.rand(1, 2, 3, 128, 128, generator=generator)
    with torch.no_grad():
        stream = VideoStream(model)
        stream(clip[:, 0])
        torch.testing.assert_close(stream(clip[:, 1]).logits, model(clip).logits)


def test_the_list_of_methods() -> None:
    header, *lines = video_overview(5, "test_resnet", size=64).splitlines()
    assert header.split() == ["name", "title", "source", "takes", "M", "G", "memory"]
    assert [line.split()[0] for line in lines] == PEERS
    words = next(line for line in lines if line.startswith("ocrnet_tcb")).split()
    model = models.create("ocrnet", 5, "test_resnet")
    assert words[-3] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
    assert words[-1] == "no" and float(words[-2]) > 0


def test_recipes() -> None:
    settings = ["model.name=pspnet_tcb", "data.history=3", "data.gap=3"]
    config = configure("moving_scenes", None, settings)
    assert config.model.method == "tcb" and config.model.arguments()["history"] == 3
    config.validate()
    assert TrainConfig.from_dict(config.to_dict()) == config
    stored = config.to_dict()
    del stored["data"]["gap"], stored["model"]["method"]  # runs of earlier versions
    stored["model"] |= {"history": 0}
    assert TrainConfig.from_dict(stored).model.name == "pspnet"
    for wrong in ("data.gap=1", "model.options.gap=2"):
        with pytest.raises(ValueError, match=r"data\.gap: \d, but the frames of the model's clips"):
            configure("moving_scenes", None, [*settings, wrong]).validate()
    with pytest.raises(ValueError, match="method: no method 'dff'"):
        dataclasses.replace(config.model, method="dff").validate()
