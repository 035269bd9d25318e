"""The memory in plain segmentors of the authors' package, by the package itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat import sssegmentation as adapter
from tests.compat.memory_in_decoders import (
    SMALL,
    K,
    check_accelerated,
    check_evaluation,
    check_loss,
    check_reload,
    check_training,
)

zoo = pytest.importorskip(
    "tests.compat.zoo_models",
    reason="needs the authors' package: pip install sssegmentation pandas dill",
)
small_settings = pytest.importorskip("tests.compat.all_segmentors").small_settings


def plain(kind: str = "FCN") -> nn.Module:
    torch.manual_seed(0)
    loss = zoo.LOSS | {"ignore_index": 255}
    config = small_settings(kind) | {"num_classes": K, "auxiliary": None}
    config["losses"] = {"loss_cls": loss | {"scale_factor": 1.0}}
    config["head"]["feats_channels"] = 16
    if kind == "FCN":
        config["backbone"] = config["backbone"] | {"depth": 18}
        config["head"]["in_channels"] = 32
    return zoo.scramble(zoo.build(config, mode="TRAIN"), torch.Generator().manual_seed(0))


def build(kind: str = "FCN") -> nn.Module:
    return adapter.with_mcibi(plain(kind), **SMALL)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    output = model(zoo.inputs(images, labels, mode="TRAIN"))
    assert output.losses_log_dict["loss_total"] == pytest.approx(output.loss.item(), rel=1e-5)
    return output.loss


def plain_loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return type(model).forward(model, zoo.inputs(images, labels, mode="TRAIN")).loss


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(zoo.inputs(images)).seg_logits


@pytest.mark.slow
def test_fcn_learns_and_reloads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    check_training(model, loss_of, monkeypatch)
    check_evaluation(model, logits_of)
    io = pytest.importorskip("ssseg.modules.utils.io")
    io.saveckpts({"model": model.state_dict()}, str(tmp_path / "model.pth"))
    other = build()
    other.load_state_dict(io.loadckpts(str(tmp_path / "model.pth"))["model"])
    check_reload(model, other, logits_of)


@pytest.mark.slow
def test_with_accelerate_in_both_orders() -> None:
    """ANNNet has two of the blocks that are accelerated."""
    check_accelerated(adapter, lambda: plain("ANNNet"), loss_of, logits_of, upsamples=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FCN", "PSPNet", "Deeplabv3", "UPerNet", "Segformer"])
def test_the_loss_of_W(kind: str) -> None:
    check_loss(build(kind), loss_of, plain_loss_of)


def test_what_is_no_plain_segmentor_is_named() -> None:
    with pytest.raises(ValueError, match="with_mcibi: Linear is not known; of sssegmentation"):
        adapter.with_mcibi(nn.Linear(1, 1))
