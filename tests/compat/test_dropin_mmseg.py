"""`compat.mmseg` on mmsegmentation's models, through its own ``loss`` and ``predict``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat import mmseg as library
from tests.compat import dropin
from tests.compat.dropin import SIZE, K

pytest.importorskip(
    "mmseg",
    reason="onedl-mmsegmentation is not installed: pip install --no-deps -r "
    "tests/compat/mmseg_requirements.txt",
)
import mmseg.models
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

NORM = {"type": "BN", "requires_grad": True}
CE = {"type": "CrossEntropyLoss", "use_sigmoid": False}


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]), DefaultScope.overwrite_default_scope("mmseg"):
        yield


def build(**options: Any) -> nn.Module:
    """FCN with an auxiliary head on a ResNet-18 of four channels."""
    head = {
        "type": "FCNHead",
        "in_channels": 32,
        "in_index": 3,
        "channels": 16,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.0,
        "num_classes": K,
        "norm_cfg": NORM,
        "align_corners": False,
        "loss_decode": CE,
    } | options
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": SIZE},
        "backbone": {
            "type": "ResNet",
            "depth": 18,
            "base_channels": 4,
            "strides": (1, 2, 1, 1),
            "dilations": (1, 1, 2, 4),
            "norm_cfg": NORM,
        },
        "decode_head": head,
        "auxiliary_head": head | {"in_channels": 16, "in_index": 2},
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    torch.manual_seed(0)
    return MODELS.build(ConfigDict(config))


def samples(labels: Tensor) -> list[Any]:
    """Labels (1, H, W) each, as mmsegmentation has them."""
    found = []
    for each in labels:
        shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), SIZE)
        sample = SegDataSample(metainfo=shapes)
        sample.gt_sem_seg = PixelData(data=each[None])
        found.append(sample)
    return found


def loss_of(x: Tensor, y: Tensor) -> Any:
    """The sum of what `loss` returns, and the accuracy so that it is compared."""

    def run(model: nn.Module) -> Tensor:
        losses = model(x, samples(y), mode="loss")
        assert "decode.acc_seg" in losses
        return sum(value.sum() for value in losses.values())

    return run


def predict(x: Tensor) -> Any:
    def run(model: nn.Module) -> Tensor:
        found = model(x, samples(torch.zeros(2, *SIZE)), mode="predict")
        return torch.stack([sample.pred_sem_seg.data for sample in found])

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"align_corners": True},
        {"loss_decode": CE | {"class_weight": [0.5, 1, 1, 2, 1, 1.0], "loss_weight": 0.7}},
        {"loss_decode": CE | {"avg_non_ignore": True}},
    ],
    ids=["align_corners", "class_weight", "avg_non_ignore"],
)
def test_agrees(options: dict[str, Any], generator: torch.Generator) -> None:
    x, y = dropin.images(generator), dropin.labels(generator)
    model = build(**options).double()
    fast = dropin.check_accelerate(library, model, loss_of(x, y), predict(x))
    got, expected = (m.eval()(x, samples(y), mode="predict") for m in (fast, model))
    dropin.assert_close([s.seg_logits.data + 0 for s in got], [s.seg_logits.data for s in expected])


@pytest.mark.parametrize(
    ("information", "waits"),
    [
        ({"padding_size": [3, 5, 0, 8], "ori_shape": (56, 56)}, True),
        ({"flip": True, "flip_direction": "horizontal"}, True),
        ({"padding_size": [0, 4, 2, 0], "flip": True, "flip_direction": "vertical"}, False),
        ({"ori_shape": (80, 96)}, False),
    ],
    ids=["padding", "flip", "padding resized", "resized"],
)
def test_from_the_logits_to_the_image(
    information: dict[str, Any], waits: bool, generator: torch.Generator
) -> None:
    """A second resize needs the result of the first one; nothing else does."""
    x = dropin.images(generator)
    model = build().double().eval()
    fast = library.accelerate(copy.deepcopy(model))

    @torch.no_grad()
    def run(each: nn.Module) -> Any:
        given = samples(torch.zeros(2, *SIZE))
        for sample in given:
            sample.set_metainfo(information)
        return each(x, given, mode="predict")

    with dropin.Formed(2, K, *SIZE) as formed:
        found = run(fast)
    assert formed.found != waits
    for got, expected in zip(found, run(model), strict=True):
        assert torch.equal(got.pred_sem_seg.data, expected.pred_sem_seg.data)
        dropin.assert_close([got.seg_logits.data + 0], [expected.seg_logits.data])


def test_the_mean_is_over_all_pixels_unless_asked(generator: torch.Generator) -> None:
    """mmsegmentation's default divides by the ignored pixels as well."""
    x, y = dropin.images(generator), dropin.labels(generator)
    valid = float((y != 255).double().mean())
    losses = [
        library.accelerate(build(loss_decode=CE | options).double().eval())(
            x, samples(y), mode="loss"
        )["decode.loss_ce"]
        for options in ({}, {"avg_non_ignore": True})
    ]
    assert float(losses[0]) == pytest.approx(valid * float(losses[1]))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sampler": {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 50}}, "sampler"),
        ({"loss_decode": [CE, {"type": "DiceLoss"}]}, "loss_decode"),
    ],
)
def test_what_reads_the_logits_is_left_alone(
    options: dict[str, Any], what: str, generator: torch.Generator
) -> None:
    x, y = dropin.images(generator), dropin.labels(generator)
    model = build(**options).double()
    fast = library.accelerate(copy.deepcopy(model))
    run = loss_of(x, y)
    dropin.assert_close(dropin.step(fast, run), dropin.step(model, run))
    left = library.explain(fast).left_alone
    assert [place.name for place in left] == [f"decode_head.{what}", f"auxiliary_head.{what}"]
    assert "reads the upsampled logits" in left[0].why


def test_binary_heads_and_other_models_are_errors() -> None:
    sigmoid = CE | {"use_sigmoid": True}
    binary = build(num_classes=2, out_channels=1, threshold=0.3, loss_decode=sigmoid)
    with pytest.raises(ValueError, match="one class: its upsampled logits are no larger"):
        library.accelerate(binary)
    with pytest.raises(ValueError, match=r"nothing in Linear .*BaseDecodeHead"):
        library.accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize("mixed", [False, True])
def test_train_step(mixed: bool, generator: torch.Generator) -> None:
    """mmengine's ``train_step`` with two accumulated batches.

    Its own wrapper for mixed precision refuses a CPU; autocast around the step is what it does.
    """
    x, y = dropin.images(generator, torch.float32), dropin.labels(generator)
    parameters = []
    for kind in (lambda m: m, library.accelerate):
        model = kind(build()).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optim = OptimWrapper(optimizer=optimizer, accumulative_counts=2)
        optim.initialize_count_status(model, 0, 4)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                model.train_step({"inputs": list(x), "data_samples": samples(y)}, optim)
        parameters.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    bar = 1e-2 if mixed else 1e-5
    assert (parameters[1] - parameters[0]).norm() <= bar * parameters[0].norm()


assert mmseg.models
