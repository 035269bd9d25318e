"""Gradient accumulation: the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.models import Segmentor
from mcibi_fast.nn import PixelLoss
from mcibi_fast.training.micro_batches import accumulate_gradients, micro_batches
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from mcibi_fast.training.trainer import Trainer


@pytest.fixture(autouse=True)
def keep_the_global_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make_batch() -> dict[str, Tensor]:
    """Four images, of which the halves have very different numbers of valid pixels."""
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(3, (4, 32, 32), generator=generator, dtype=torch.uint8)
    label[0], label[1, :30] = 255, 255
    return {"image": torch.randn(4, 3, 32, 32, generator=generator), "label": label}


def make_model(loss: PixelLoss, name: str = "fcn") -> Segmentor:
    """In float64, batch norms frozen and dropout off."""
    torch.manual_seed(1)
    model = models.create(
        name, 3, backbone="test_resnet", feats_channels=8, dropout=0.0, loss=loss
    ).double()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def accumulate(model: Segmentor, parts: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch["image"] = batch["image"].double()
    return accumulate_gradients(
        Accelerator(cpu=True), model, batch, parts=parts, loss=model.head.loss, ignore_index=255
    )


def gradients(model: Segmentor) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"class_weights": [0.5, 1.0, 3.0], "label_smoothing": 0.1}]
)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_same_gradient_and_losses(parts: int, options: dict[str, Any]) -> None:
    model = make_model(PixelLoss(**options))
    whole, expected = accumulate(model, 1, make_batch()), gradients(model)
    model = make_model(PixelLoss(**options))
    losses, actual = accumulate(model, parts, make_batch()), gradients(model)
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    assert losses.keys() == whole.keys() and len(whole) > 0
    for name, value in whole.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=0)


def test_the_mean_of_the_parts_means_would_not_do() -> None:
    model = make_model(PixelLoss())
    accumulate(model, 1, make_batch())
    expected = gradients(model)["backbone.body.conv1.0.weight"]
    model = make_model(PixelLoss())
    for half in (slice(0, 2), slice(2, 4)):
        batch = {name: value[half] for name, value in make_batch().items()}
        accumulate(model, 1, batch)
    mean = gradients(model)["backbone.body.conv1.0.weight"] / 2
    assert (mean - expected).abs().max() > 1e-3 * expected.abs().max()


def test_one_part_is_left_as_it_is() -> None:
    batch = make_batch()
    ((images, labels, share),) = micro_batches(
        batch, 1, PixelLoss(), ignore_index=255, device=torch.device("cpu")
    )
    assert share is None
    assert torch.equal(images, batch["image"]) and torch.equal(labels, batch["label"])


def test_shares_are_of_valid_pixels_and_sum_to_one() -> None:
    batch = make_batch()
    device = torch.device("cpu")
    passes = list(micro_batches(batch, 4, PixelLoss(), ignore_index=255, device=device))
    shares = torch.stack([share for _, _, share in passes])
    torch.testing.assert_close(shares, torch.tensor([0, 64, 1024, 1024]) / 2112.0)
    batch["label"][:] = 255
    passes = list(micro_batches(batch, 2, PixelLoss(), ignore_index=255, device=device))
    assert [float(share) for _, _, share in passes] == [0, 0]


def test_the_memory_is_updated_once_per_part() -> None:
    for parts in (1, 2, 4):
        model = make_model(PixelLoss(), "fcn_mcibipp")
        accumulate(model, parts, make_batch())
        assert int(model.memory.noise_state[1]) == 1 + parts


@pytest.mark.slow
def test_training_with_micro_batches_sees_the_same_samples(
    tiny_config: Callable, tmp_path: Path
) -> None:
    results = {}
    settings = ["model.name=fcn", "epochs=1", "log_every=1", "optimizer.lr=1e-6"]
    for parts in (1, 2):
        config = tiny_config(*settings, f"accumulate={parts}")
        config.model.options = {"feats_channels": 8, "dropout": 0.0}
        seed_global_generators(0)
        out = tmp_path / str(parts)
        results[parts] = train(config, out, progress=False, report=lambda line: None)
        assert results[parts].steps == 3
    first, second = ([e for e in Run(tmp_path / str(p)).history() if "loss" in e] for p in (1, 2))
    # Batch norms see halves of the batch: near, not equal.
    for one, two in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.2)
        assert one["loss"] != two["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["accumulate=0"], "accumulate: expected at least 1, got 0"),
        (["accumulate=3"], "batch_size: 4 is not a multiple of accumulate=3"),
    ],
)
def test_what_does_not_divide(
    tiny_config: Callable, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_config(*settings), tmp_path, progress=False)


def test_what_does_not_divide_among_processes(
    tiny_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    with pytest.raises(ValueError, match="batch_size: 4 is not a multiple of accumulate=2 times 4"):
        Trainer(tiny_config("accumulate=2"), Run("unused"))
