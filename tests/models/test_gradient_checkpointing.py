"""Models that compute activations again in the backward pass train as those that keep them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.nn.transient import states
from mcibi_fast.training.train import train
from tests.models.stub_backbone import FRAMEWORKS, Stub
from tests.tiny_run import make_tiny_config

OPTIONS = {"feats_channels": 8, "transform_channels": 6}
MODELS: dict[str, dict[str, Any]] = {
    "fcn": {},
    "fcn_mcibipp": {"form": "paper"},
    "fcn_mcibi": {"representations": 2},
    "upernet_mcibipp": {"form": "paper", "memory_joins": "before"},
    "pspnet_mcibipp": {"extra_attention": True},
    "isnet_mcibi": {},
    "video": {"form": "paper", "history": 1, "name": "fcn_mcibipp"},
    **{f"{f}{m}": {} for f in FRAMEWORKS for m in ("", "_mcibipp", "_mcibi")},
}
FAST = ("fcn", "fcn_mcibipp", "isnet_mcibi", "upernet_mcibipp", "video")


def build(name: str, backbone: str = "test_resnet") -> models.Segmentor:
    options = {"name": name, **OPTIONS, **MODELS[name]}
    if "_" not in options["name"]:
        options.pop("transform_channels")
        if options["name"] == "isnet":
            options["transform_channels"] = 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(options.pop("name"), 5, backbone, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 0:
                    parameter.fill_(0.5)  # gates that are closed at the start
    return model.double().train()


def trained(model: models.Segmentor) -> list[Tensor]:
    """Gradients, losses and states of two steps, with dropout."""
    generator = torch.Generator().manual_seed(1)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for step in range(2):
            model.schedule(epoch=step, lr_factor=0.5)
            clip = (model.history + 1,) if isinstance(model, models.VideoSegmentor) else ()
            images = torch.randn(2, *clip, 3, 40, 48, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, 5, (2, 40, 48), generator=generator)
            losses = model(images, labels).losses
            torch.stack(list(losses.values())).sum().backward()
            found += [value.detach() for value in losses.values()]
    found += [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return found + [t.clone() for t in states(model)]


def kept_bytes(model: models.Segmentor) -> int:
    """What one forward keeps for its backward, besides the weights."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, labels = torch.randn(2, 3, 64, 64).double(), torch.zeros(2, 64, 64).long()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(images, labels).losses
    del losses
    return sum(kept.values())


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_gradients_and_states_are_those_without_it(name: str) -> None:
    expected = trained(build(name))
    model = build(name)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_close(trained(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_mcibipp", "fcn_mcibi"])
@pytest.mark.thinned(
    only={"name": ["fcn_mcibipp"]}
)  # tests/nn/test_checkpointing.py has both memories
def test_compiled(name: str) -> None:
    expected, model = trained(build(name)), build(name)
    model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    assert_close(trained(model), expected)


@pytest.mark.slow
def test_fewer_activations_are_kept() -> None:
    model = build("upernet_mcibipp", "resnet50")
    usual = kept_bytes(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fewer = kept_bytes(model)
    model.gradient_checkpointing_disable()
    assert kept_bytes(model) == usual > 2 * fewer
    assert not model.is_gradient_checkpointing
    model.set_grad_checkpointing()
    assert kept_bytes(model) == fewer
    model.set_grad_checkpointing(False)
    assert kept_bytes(model) == usual


def test_copies_and_pickles() -> None:
    model = build("fcn_mcibipp")
    expected = trained(copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.is_gradient_checkpointing
        assert_close(trained(twin), expected)
        twin.gradient_checkpointing_disable()
        norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(m._forward_pre_hooks or m._forward_hooks for m in norms)
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    build("fcn_mcibipp").load_state_dict(model.state_dict())  # the keys stay


def test_enabling_twice_is_enabling_once() -> None:
    model = build("fcn_mcibipp")
    expected = trained(copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable()
    assert_close(trained(model), expected)
    model.gradient_checkpointing_disable()
    assert not any(m._forward_hooks for m in model.modules())


def test_evaluation_is_untouched() -> None:
    model = build("fcn_mcibipp").eval()
    images = torch.randn(1, 3, 32, 32).double()
    expected = model(images).logits
    model.gradient_checkpointing_enable()
    assert torch.equal(model(images).logits, expected)
    assert torch.equal(
        model.fold()(images).logits, build("fcn_mcibipp").eval().fold()(images).logits
    )


@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"debug": True}])
def test_other_settings_are_refused(settings: dict[str, Any]) -> None:
    model = build("fcn_mcibipp")
    with pytest.raises(ValueError, match=r"^gradient_checkpointing_kwargs: only use_reentrant=F"):
        model.gradient_checkpointing_enable(settings)
    assert not model.is_gradient_checkpointing


def test_a_backbone_that_cannot_is_named() -> None:
    def make() -> models.Segmentor:
        torch.manual_seed(0)
        head = models.MCIBIPPHead(5, [8] * 4, feats_channels=8, transform_channels=6)
        return models.Segmentor(Stub(), head).double().train()

    expected, model = trained(make()), make()
    with pytest.warns(UserWarning, match=r"^gradient_checkpointing: Stub cannot do it"):
        model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.gradient_checkpointing_disable()
    with pytest.warns(UserWarning):
        model.set_grad_checkpointing(True)
    assert_close(trained(model), expected)


@pytest.fixture
def swin() -> Iterator[str]:
    yield (
        'released_swin {"width": 8, "depths": [6, 2], "heads": [1, 2], "window_size": 4, '
        '"mlp_ratio": 2, "patch_size": 4}'
    )


def test_the_released_swin(swin: str) -> None:
    def make() -> models.Segmentor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models.create("fcn_mcibipp", 5, swin, output_stride=8, **OPTIONS)
        return model.double().train()

    expected, model = trained(make()), make()
    usual = kept_bytes(model)
    model.gradient_checkpointing_enable()
    assert kept_bytes(model) < usual / 2
    model = make()
    model.gradient_checkpointing_enable()
    assert_close(trained(model), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("settings", [(), ("accumulate=2", "mixed_precision=bf16")])
def test_training_with_it(settings: tuple[str, ...], tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    results = []
    for on in ("false", "true"):
        AcceleratorState._reset_state(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = make_tiny_config("epochs=1", f"gradient_checkpointing={on}", *settings)
            train(config, tmp_path / on, progress=False, report=lambda line: None)
        results.append(models.checkpoint.load_model(tmp_path / on)[0].state_dict())
    tolerance = 1e-5 if not settings else 1e-2
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=tolerance, atol=tolerance)
