"""torch.compile of every framework without a graph break, equal to eager: training, evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from mcibi_fast import models
from mcibi_fast.models.output import SegmentationOutput
from tests.models.stub_backbone import FRAMEWORKS, stubbed

K, Z = 5, 16
FAST = ("fcn_mcibipp paper",)
# FCN in every combination; each other framework with one form of MCIBI++, whose compiled context
# within the image is that of the framework alone; ISNet has a classifier of its own.
CHOSEN = [
    *("fcn", "fcn_mcibipp released", "fcn_mcibipp paper", "fcn_mcibi released"),
    *("pspnet_mcibipp paper", "deeplabv3_mcibipp released", "upernet_mcibipp paper"),
    *("isnet", "isnet_mcibipp released"),
]
CASES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in (
        *FRAMEWORKS,
        *(f"{name}_mcibipp {form}" for name in FRAMEWORKS for form in ("released", "paper")),
        "fcn_mcibi released",
    )
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    with stubbed(monkeypatch):
        yield
    torch._dynamo.reset()


def build(name: str) -> models.Segmentor:
    framework, _, form = name.partition(" ")
    options = {"form": form} if form else {}
    if form or framework == "isnet":
        options["transform_channels"] = 8
    if framework.startswith("deeplabv3"):
        options["dilations"] = (1, 2)
    # Without dropout, so that eager and compiled runs need not draw alike.
    return models.create(framework, K, feats_channels=Z, dropout=0.0, **options).double()


def batch(generator):
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (2, 32, 32), generator=generator)
    labels[:, :3] = 255
    return images, labels


def step(model, images, labels) -> SegmentationOutput:
    output = model(images, labels)
    sum(output.losses.values()).backward()
    return output


def assert_close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


def assert_same_step(model, twin, images, labels, **options):
    """Forward, losses, gradients, batch statistics and the memory after one training step."""
    expected = step(model, images, labels)
    output = step(torch.compile(twin, fullgraph=True, **options), images, labels)
    assert output.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert_close(output.losses[name], loss)
    assert_close(output.logits, expected.logits)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert_close(other.grad, parameter.grad)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert_close(other, buffer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(only={"name": CHOSEN})
def test_training(name, generator):
    model = build(name).train()
    twin = copy.deepcopy(model)
    before = model.memory.memory.clone() if "mcibi" in name else None
    # What autograd makes of the traced backward is the same for all: one of them is enough.
    backend = "aot_eager" if name.startswith("fcn") else "eager"
    assert_same_step(model, twin, *batch(generator), backend=backend)
    if before is not None:
        assert not torch.equal(model.memory.memory, before)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(only={"name": CHOSEN})
def test_evaluation(name, generator):
    """As trained and, with a memory, folded; two stages."""
    model = build(name).eval()
    images, _ = batch(generator)
    variants = [(model, {})]
    if "mcibi" in name:
        variants = [(model, {"stages": 2}), (model.fold(), {"stages": 2})]
    for variant, options in variants:
        torch._dynamo.reset()
        expected = variant(images, **options).logits
        compiled = torch.compile(variant, fullgraph=True, backend="eager")
        assert_close(compiled(images, **options).logits, expected)
