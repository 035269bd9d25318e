"""The memory in models of segmentation_models.pytorch, by the real library."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.compat.memory_in_decoders import (
    SMALL,
    K,
    check_accelerated,
    check_evaluation,
    check_loss,
    check_reload,
    check_training,
)

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")
adapter = pytest.importorskip("mcibi_fast.compat.smp")


def plain(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return getattr(smp, name)("resnet18", encoder_weights=None, classes=K, **options)


def pspnet() -> nn.Module:
    return plain("PSPNet", encoder_depth=3, psp_out_channels=16)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    return criterion(model(images), labels) + model.mcibi_loss(labels)


def plain_loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels, ignore_index=255)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


@pytest.mark.slow
def test_pspnet_learns_and_reloads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter.with_mcibi(pspnet(), **SMALL)
    check_training(model, loss_of, monkeypatch)
    check_evaluation(model, logits_of)
    model.save_pretrained(tmp_path)
    check_reload(model, adapter.from_pretrained(tmp_path), logits_of)
    check_reload(model, pickle.loads(pickle.dumps(model)), logits_of)
    with pytest.raises(RuntimeError, match="Missing key"):
        smp.from_pretrained(tmp_path)  # the library alone does not know of the memory


@pytest.mark.slow
def test_with_accelerate_in_both_orders() -> None:
    check_accelerated(adapter, pspnet, loss_of, logits_of)


@pytest.mark.parametrize(
    ("name", "pool"), [("Unet", 8), ("DeepLabV3", 1), ("DeepLabV3Plus", 2), ("Segformer", 2)]
)
def test_the_loss_of_W_and_the_stride(name: str, pool: int) -> None:
    model = adapter.with_mcibi(plain(name), **SMALL)
    assert adapter.context_of(model).pool == pool
    check_loss(model, loss_of, plain_loss_of)


def test_what_is_no_model_of_the_library_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="with_mcibi: Linear is not known; of segmentation_models"):
        adapter.with_mcibi(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="needs a model of two classes or more"):
        adapter.with_mcibi(smp.FPN("resnet18", encoder_weights=None, classes=1))
    smp.FPN("resnet18", encoder_weights=None, classes=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no memory; load it with segmentation_models_pytorch"):
        adapter.from_pretrained(tmp_path)
