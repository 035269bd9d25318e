"""`compat.smp` on the models of segmentation_models_pytorch with its smallest encoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.compat import smp as library
from mcibi_fast.compat.upsampled import Upsampled
from tests.compat import dropin
from tests.compat.dropin import K


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def build(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"encoder_name": "resnet18", "encoder_weights": None, "classes": K} | options
    return dropin.without_dropout(getattr(smp, kind)(**options)).double()


def test_agrees(generator: torch.Generator) -> None:
    """align_corners is True, as smp has it; with weights of classes and label smoothing."""
    x, y = dropin.images(generator), dropin.labels(generator)
    weight = torch.rand(K, generator=generator, dtype=torch.float64)

    def loss_of(model: nn.Module) -> Tensor:
        options: Any = {"ignore_index": 255, "label_smoothing": 0.1}
        return F.cross_entropy(model(x), y, weight, **options)

    model = build("PSPNet", psp_out_channels=16)
    fast = dropin.check_accelerate(library, model, loss_of, lambda m: m(x).argmax(1))
    assert "align_corners=True" in str(library.explain(fast))
    assert torch.equal(fast.predict(x).max(1)[1], fast(x).argmax(1))


SMALL: dict[str, dict[str, Any]] = {
    "DeepLabV3": {"decoder_channels": 16},
    "DeepLabV3Plus": {"decoder_channels": 16},
    "DPT": {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True},
    "FPN": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    "PAN": {"decoder_channels": 8},
    "Segformer": {"decoder_segmentation_channels": 16},
    "UPerNet": {"decoder_channels": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SMALL))
def test_every_model_that_upsamples(kind: str, generator: torch.Generator) -> None:
    slow, fast = build(kind, **SMALL[kind]).eval(), build(kind, **SMALL[kind]).eval()
    assert library.accelerate(fast) is fast
    size = 128 if kind == "PAN" else 64
    x = torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64)
    y = torch.randint(0, K, (1, size, size), generator=generator)

    def loss_of(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    assert type(fast(x)) is Upsampled
    dropin.assert_close(dropin.step(fast, loss_of), dropin.step(slow, loss_of), 1e-9)


@pytest.mark.parametrize("loss", ["DiceLoss", "FocalLoss", "SoftCrossEntropyLoss"])
def test_other_losses_read_ordinary_logits(loss: str, generator: torch.Generator) -> None:
    x, y = dropin.images(generator), dropin.labels(generator)
    options = {"smooth_factor": 0.1} if loss == "SoftCrossEntropyLoss" else {"mode": "multiclass"}
    criterion = getattr(smp.losses, loss)(ignore_index=255, **options)
    slow = build("PSPNet", psp_out_channels=16).eval()
    fast = library.accelerate(copy.deepcopy(slow))

    def loss_of(model: nn.Module) -> Tensor:
        return criterion(model(x), y)

    dropin.assert_close(dropin.step(fast, loss_of), dropin.step(slow, loss_of))


@pytest.mark.parametrize("activation", ["softmax2d", "argmax2d"])
def test_activations_over_the_classes(activation: str, generator: torch.Generator) -> None:
    x = dropin.images(generator)
    slow = build("PSPNet", psp_out_channels=16, activation=activation).eval()
    fast = library.accelerate(copy.deepcopy(slow))

    @torch.no_grad()
    def classes(model: nn.Module) -> Tensor:
        found = model(x)
        return found if activation == "argmax2d" else found.argmax(1)

    assert torch.equal(classes(fast), classes(slow))
    assert not dropin.forms_upsampled_logits(lambda: classes(fast))
    dropin.assert_close([fast(x) + 0], [slow(x) + 0])


def test_what_is_left_alone() -> None:
    reasons = {
        "it does not upsample: the decoder ends at the size of the image": build("Unet"),
        r"its activation \(Sigmoid\) reads the upsampled logits": build(
            "FPN", activation="sigmoid"
        ),
        "one class": build("FPN", classes=1),
    }
    for reason, model in reasons.items():
        with pytest.raises(ValueError, match=reason):
            library.accelerate(model)
        assert [place.name for place in library.explain(model).left_alone] == ["segmentation_head"]
