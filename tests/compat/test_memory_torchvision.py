"""The memory in torchvision's segmentation models, by the real library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat import torchvision as adapter
from tests.compat.memory_in_decoders import (
    SMALL,
    K,
    check_accelerated,
    check_evaluation,
    check_loss,
    check_reload,
    check_training,
)

segmentation = pytest.importorskip("torchvision.models.segmentation", reason="needs torchvision")


class Backbone(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(images)}


def plain(name: str = "FCN") -> nn.Module:
    torch.manual_seed(0)
    if name == "FCN":
        return segmentation.FCN(Backbone(), segmentation.fcn.FCNHead(16, K))
    return segmentation.DeepLabV3(Backbone(), segmentation.deeplabv3.DeepLabHead(16, K))


def build(name: str = "FCN") -> nn.Module:
    return adapter.with_mcibi(plain(name), **SMALL)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return plain_loss_of(model, images, labels) + model.mcibi_loss(labels)


def plain_loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images)["out"], labels, ignore_index=255)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)["out"]


@pytest.mark.slow
def test_fcn_learns_and_reloads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    check_training(model, loss_of, monkeypatch)
    check_evaluation(model, logits_of)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build()
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    check_reload(model, other, logits_of)


def test_with_accelerate_in_both_orders() -> None:
    check_accelerated(adapter, plain, loss_of, logits_of)


@pytest.mark.parametrize("name", ["FCN", "DeepLabV3"])
def test_the_loss_of_W(name: str) -> None:
    check_loss(build(name), loss_of, plain_loss_of)


def test_dropout_moves_behind_the_context() -> None:
    model = build()
    assert isinstance(model.classifier[3], nn.Identity)
    assert isinstance(adapter.context_of(model).dropout, nn.Dropout)
    with pytest.raises(ValueError, match="with_mcibi: LRASPP is not known; of torchvision"):
        adapter.with_mcibi(
            segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
        )
