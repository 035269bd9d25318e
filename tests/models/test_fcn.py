"""FCN with and without MCIBI++: outputs, losses, the memory's update, tracing, precisions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.models import SegmentationOutput
from tests.learning import share_left

TINY = {"backbone": "test_resnet", "feats_channels": 16}
MCIBIPP = {**TINY, "transform_channels": 8}


def options(name: str) -> dict:
    return MCIBIPP if name == "fcn_mcibipp" else TINY


def batch(generator, size=(40, 48), dtype=torch.float32):
    images = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    labels[:, :3] = 255
    return images, labels


@pytest.mark.parametrize("name", ["fcn", "fcn_mcibipp"])
@pytest.mark.parametrize("size", [(40, 48), (37, 51)])
def test_output(name, size, generator):
    images, labels = batch(generator, size)
    model = models.create(name, 5, **options(name)).eval()
    out = model(images)
    assert isinstance(out, SegmentationOutput)
    h, w = (-(-s // 8) for s in size)
    assert out.logits.shape == (2, 5, h, w)
    assert out.losses == {}
    assert out.context_logits is None
    assert model.pixel_representations(images).shape == (2, 16, h, w)
    expected = {"loss_cls", "loss_aux"} | ({"loss_pr"} if name == "fcn_mcibipp" else set())
    assert set(model(images, labels).losses) == expected


def test_without_an_auxiliary_head(generator):
    images, labels = batch(generator)
    for name in ("fcn", "fcn_mcibipp"):
        model = models.create(name, 5, auxiliary_weight=0.0, **options(name))
        assert "loss_aux" not in model(images, labels).losses
        assert not any("auxiliary" in key for key in model.state_dict())


def test_memory_is_updated_by_training_steps_alone(generator):
    images, labels = batch(generator)
    model = models.create("fcn_mcibipp", 5, **MCIBIPP)
    assert [k for k in model.state_dict() if "memory" in k] == ["head.context.memory.memory"]
    before = model.memory.memory.clone()
    model(images)
    model.eval()(images, labels)
    assert torch.equal(model.memory.memory, before)
    twin = copy.deepcopy(model).train()
    model.train()(images, labels)
    twin.memory.update(twin.pixel_representations(images).detach(), labels)
    torch.testing.assert_close(model.memory.memory, twin.memory.memory)
    assert not torch.equal(model.memory.memory, before)
    assert not hasattr(models.create("fcn", 5, **TINY), "memory")


@pytest.mark.parametrize("form", ["paper", "released"])
def test_training_lowers_the_loss(form, generator):
    images, labels = batch(generator, (32, 32))
    labels = labels[:, 8::8, 8::8].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :32, :32]
    model = models.create("fcn_mcibipp", 5, form=form, dropout=0.0, **MCIBIPP)
    if form == "paper":
        model.memory.initialize(model.pixel_representations(images).detach(), labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = []
    for _ in range(24):
        optimizer.zero_grad()
        loss = sum(model(images, labels).losses.values())
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert share_left(history) < 0.6


@pytest.mark.parametrize("form", ["paper", "released"])
def test_fusion_hard_and_downsample_train(form, generator):
    images, labels = batch(generator)
    for extra in (
        {"fusion": "add"},
        {"fusion": "weighted_add"},
        {"hard": True, "downsample": True},
    ):
        model = models.create("fcn_mcibipp", 5, form=form, **MCIBIPP, **extra)
        sum(model(images, labels).losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.thinned
def test_compiles_in_one_graph(form, stages, generator):
    images, _ = batch(generator)
    model = models.create("fcn_mcibipp", 5, form=form, stages=stages, **MCIBIPP).eval()
    with torch.no_grad():
        expected = model(images).logits
        backend = "aot_eager" if stages == 2 else "eager"
        compiled = torch.compile(model, fullgraph=True, backend=backend)(images).logits
    torch.testing.assert_close(compiled, expected)


def test_exports(generator):
    images, _ = batch(generator)
    model = models.create("fcn_mcibipp", 5, form="paper", **MCIBIPP).eval()
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images).logits, model(images).logits)


def test_half_leaves_the_memory_in_float32(generator):
    images, _ = batch(generator)
    model = models.create("fcn_mcibipp", 5, **MCIBIPP).eval()
    with torch.no_grad():
        expected = model(images).logits
        model = model.bfloat16()
        assert model.memory.memory.dtype == torch.float32
        logits = model(images.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_trains(generator):
    images, labels = batch(generator)
    model = models.create("fcn_mcibipp", 5, **MCIBIPP)
    before = model.memory.memory.clone()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, labels)
    sum(out.losses.values()).backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())
    assert model.memory.memory.dtype == torch.float32
    assert not torch.equal(model.memory.memory, before)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_sync_batchnorm_needs_a_distributed_cuda_run():
    model = models.create("fcn", 5, **TINY)
    converted = models.convert_sync_batchnorm(model)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())


def test_wrong_arguments_are_named(generator):
    images, labels = batch(generator)
    with pytest.raises(
        ValueError, match=r"no model 'fnc'; there are .*fcn, .*fcn_mcibi, fcn_mcibipp"
    ):
        models.create("fnc", 5)
    with pytest.raises(TypeError, match=r"colour"):
        models.create("fcn", 5, colour=1, **TINY)
    for wrong in ({"form": "printed"}, {"mixing": "none"}, {"weights_from": "cwi"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            models.create("fcn_mcibipp", 5, **MCIBIPP, **wrong)
    model = models.create("fcn_mcibipp", 5, **MCIBIPP)
    with pytest.raises(ValueError, match=r"images.*uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images.*\(3, 40, 48\)"):
        model(images[0])
    with pytest.raises(ValueError, match=r"labels.*\(2, 40, 48\).*\(2, 40, 47\)"):
        model(images, labels[..., :-1])
    with pytest.raises(ValueError, match=r"stages.*0"):
        model.eval()(images, stages=0)
    labels[0, 9, 9] = 200
    with pytest.raises(ValueError, match=r"labels: value 200 at \(b=0, y=9, x=9\)"):
        model.train()(images, labels)
