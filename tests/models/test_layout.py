"""Convolutions compute in channels_last; depthwise ones in float32 where bfloat16 is slower."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.models.depthwise import depthwise_in_float32
from tests.models.stub_backbone import FRAMEWORKS


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("memory", [None, "mcibipp"])
def test_maps_are_in_channels_last_whatever_the_images_are(framework, memory):
    model = models.create(
        framework, 5, "test_resnet", memory=memory, feats_channels=8, **small(memory)
    )
    maps = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert is_channels_last(module.weight)
            module.register_forward_hook(lambda _, i, o, name=name: maps.__setitem__(name, o))
    images = torch.rand(2, 3, 64, 48)
    logits = model.eval()(images).logits
    others = {name: tuple(m.shape) for name, m in maps.items() if not is_channels_last(m)}
    # ISNet reads its image-level context, one map per image, in the usual layout.
    others = {n: m for n, m in others.items() if "_level.attention" not in n}
    assert len(maps) > 5 and not others, others
    contiguous = copy.deepcopy(model)
    for parameter in contiguous.parameters():
        parameter.data = parameter.data.contiguous()
    torch.testing.assert_close(contiguous(images).logits, logits, rtol=1e-4, atol=1e-5)


def small(memory):
    return {"transform_channels": 8} if memory else {}


def test_depthwise_convolutions_leave_autocast_and_keep_names_and_gradients():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Conv2d(8, 4, 1)
    )
    twin = copy.deepcopy(model)
    assert depthwise_in_float32(model) == 1 == depthwise_in_float32(model)  # twice is once
    assert list(model.state_dict()) == list(twin.state_dict())
    assert isinstance(model[1], nn.Conv2d) and repr(model) == repr(twin)
    x = torch.rand(2, 4, 9, 7)
    assert torch.equal(model(x), twin(x))  # no difference without autocast
    with torch.autocast("cpu", torch.bfloat16):
        inside = model[0](x).detach()
        out = model[1](inside)
    assert inside.dtype == out.dtype == torch.bfloat16
    expected = twin[1](inside.float())
    assert torch.equal(out, expected.bfloat16())
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(model[1].weight.grad, twin[1].weight.grad)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert depthwise_in_float32(again) == 1 and type(again[1]) is type(model[1])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(again[1](inside), out)


def test_a_created_model_has_them_and_folds_traces_and_exports_as_before():
    model = models.create(
        "fcn", 5, "tf_efficientnet_lite0", memory="mcibipp", feats_channels=8, transform_channels=8
    ).eval()
    images = torch.rand(1, 3, 64, 64)
    assert depthwise_in_float32(model) == 16
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules())
    folded = model.fold()
    kept = sum(isinstance(m, nn.BatchNorm2d) for m in folded.backbone.modules())
    assert kept < norms / 4
    logits = model(images).logits
    torch.testing.assert_close(folded(images).logits, logits, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images).logits
    assert (half.float() - logits).abs().max() < 0.1 * logits.abs().max()
    program = torch.export.export(folded, (images,), strict=False)
    assert not any("autocast" in str(node.target) for node in program.graph.nodes)
