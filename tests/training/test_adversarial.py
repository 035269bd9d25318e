"""FGSM: bounded, raises the loss, and leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcibi_fast import models
from mcibi_fast.data import Scenes
from mcibi_fast.models import Segmentor
from mcibi_fast.recipes import AdversarialConfig
from mcibi_fast.training.adversarial import Adversary, fgsm
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train


@pytest.fixture(autouse=True)
def keep_the_global_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def data() -> Scenes:
    return Scenes("train", count=2, size=32, seed=0)


def batch(data: Scenes) -> tuple[Tensor, Tensor]:
    samples = [data[i] for i in range(2)]
    images, labels = ([s[key] for s in samples] for key in ("image", "label"))
    return torch.stack(images), torch.stack(labels)


def make_model() -> Segmentor:
    model = models.create(
        "fcn_mcibipp", 12, backbone="test_resnet", feats_channels=8, dropout=0.0, form="paper"
    )
    return model.train()


def colours(images: Tensor, data: Scenes) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    return 255 * (images * std + mean)


@pytest.mark.parametrize("epsilon", [0.0, 2.0, 8.0])
def test_bounded_in_pixel_units_and_still_colours(data: Scenes, epsilon: float) -> None:
    images, labels = batch(data)
    adversary = Adversary(AdversarialConfig(1.0, epsilon), data, seed=0, device=torch.device("cpu"))
    moved = colours(adversary.attack(make_model(), images, labels), data)
    change = (moved - colours(images, data)).abs()
    assert float(change.max()) <= epsilon + 1e-3
    assert float(change.mean()) >= 0.9 * epsilon - 1e-3  # the sign is rarely 0
    assert float(moved.min()) >= -1e-3 and float(moved.max()) <= 255 + 1e-3


def test_it_raises_the_loss(data: Scenes) -> None:
    images, labels = batch(data)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    model = make_model()

    def loss(x: Tensor) -> float:
        before = [b.clone() for b in model.buffers()]
        with torch.no_grad():
            value = sum(model(x, labels).losses.values())
            for buffer, old in zip(model.buffers(), before, strict=True):
                buffer.copy_(old)
        return float(value)

    moved = fgsm(model, images, labels, epsilon=1.0, mean=mean, std=std)
    away = 2 * images - moved
    assert loss(away) < loss(images) < loss(moved)


def test_no_trace_in_the_model(data: Scenes) -> None:
    images, labels = batch(data)
    model = make_model()
    parameter = next(model.parameters())
    parameter.grad = torch.full_like(parameter, 3.0)
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.requires_grad_(True)
    mean = std = torch.ones(3, 1, 1)
    moved = fgsm(model, images, labels, epsilon=1.0, mean=mean, std=std)
    assert not moved.requires_grad and model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    grads = [p for p in model.parameters() if p.grad is not None]
    assert len(grads) == 1 and bool((parameter.grad == 3).all())
    model(images, labels)  # which would have changed them
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_steps_are_drawn_privately_and_as_often_as_asked(data: Scenes) -> None:
    def steps(probability: float, seed: int = 0) -> list[bool]:
        config = AdversarialConfig(probability, 1.0)
        adversary = Adversary(config, data, seed=seed, device=torch.device("cpu"))
        return [adversary.attacks(step) for step in range(300)]

    state = torch.get_rng_state()
    assert not any(steps(0.0)) and all(steps(1.0))
    assert 60 < sum(steps(0.3)) < 120
    assert steps(0.3) == steps(0.3) != steps(0.3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_training_on_adversarial_images_alone(tiny_config: Callable, tmp_path: Path) -> None:
    losses = {}
    for epsilon in (0, 8):
        settings = ["adversarial.probability=1", f"adversarial.epsilon={epsilon}", "epochs=1"]
        seed_global_generators(0)
        config = tiny_config(*settings, "log_every=1", "model.options.dropout=0")
        out = tmp_path / str(epsilon)
        train(config, out, progress=False, report=lambda line: None)
        losses[epsilon] = [e["loss"] for e in Run(out).history() if "loss" in e]
    assert losses[8][0] > losses[0][0]
    # An epsilon of 0 probes without a trace: the plain run, to the bit.
    seed_global_generators(0)
    config = tiny_config("epochs=1", "log_every=1", "model.options.dropout=0")
    train(config, tmp_path / "plain", progress=False, report=lambda line: None)
    plain = [e["loss"] for e in Run(tmp_path / "plain").history() if "loss" in e]
    assert losses[0] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adversarial.epsilon=-1", "adversarial.epsilon: expected 0 or more, in 1/255, got -1"),
        ("adversarial.probability=2", "adversarial.probability: expected 0 to 1, got 2"),
    ],
)
def test_numbers_that_make_no_sense(tiny_config: Callable, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(setting).validate()
