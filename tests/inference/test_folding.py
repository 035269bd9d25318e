"""Models as predict, evaluate and video run them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.inference.folding import folded, folded_if_possible
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models import Segmentor
from mcibi_fast.nn import DatasetLevelContext
from mcibi_fast.recipes import InferenceConfig

NAMES = ["fcn", "fcn_mcibipp", "deeplabv3_mcibi", "fcn_video_mcibipp"]


def build(name: str, **options: object) -> Segmentor:
    """A model of five classes whose batch norms have seen images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"history": 1, **options} if "video" in name else options
        model = models.create(name, 5, "test_resnet", feats_channels=8, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        if model.head.has_memory:
            model.memory.memory.normal_().abs_()
    return model.eval()


def spread(model: Segmentor, images: torch.Tensor) -> None:
    """Biases with which no class is the largest everywhere."""
    last = [m for m in model.head.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 5]
    for convolution in (*last, *reversed(last)):
        if convolution.bias is not None:
            convolution.bias -= model(images).logits.mean((0, 2, 3))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_labels_stay_and_convolutions_are_in_channels_last(name: str) -> None:
    model = build(name)
    shape = (1, 2, 3, 48, 56) if "video" in name else (1, 3, 48, 56)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spread(model, images)
    before = copy.deepcopy(model.state_dict())
    fast = folded_if_possible(model)
    assert fast is not model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    convolutions = [m for m in fast.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.backbone.modules())
    assert not any(isinstance(m, DatasetLevelContext) for m in fast.modules())
    torch.testing.assert_close(fast(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)
    if "video" in name:
        return
    settings = [InferenceConfig(), InferenceConfig(window=(32, 32), flip=True)]
    if model.head.has_memory:
        settings.append(InferenceConfig(stages=2))
    for inference in settings:
        expected = predict_labels(model, images, (48, 56), inference)
        assert expected.unique().numel() > 1
        assert torch.equal(predict_labels(fast, images, (48, 56), inference), expected)


def test_what_cannot_be_folded_stays() -> None:
    several = build("fcn_mcibi", representations=3)
    assert folded_if_possible(several) is several
    with pytest.raises(ValueError, match="fold: needs one representation per class"):
        folded(several)
    by_labels = build("fcn_mcibipp", weights_from="labels")
    assert folded_if_possible(by_labels) is by_labels
