"""The memory in decode heads of mmsegmentation, by the real library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat import mmseg as adapter
from tests.compat.memory_in_decoders import (
    SMALL,
    K,
    check_accelerated,
    check_evaluation,
    check_loss,
    check_reload,
    check_training,
)

pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation and mmcv-lite")
MODELS = pytest.importorskip("mmseg.registry").MODELS
SegDataSample = pytest.importorskip("mmseg.structures").SegDataSample
PixelData = pytest.importorskip("mmengine.structures").PixelData
pytest.importorskip("mmseg.models")
checkpoints = pytest.importorskip("mmengine.runner.checkpoint")

HEADS = {
    "FCNHead": {"in_channels": 8, "in_index": 3, "num_convs": 1},
    "PSPHead": {"in_channels": 8, "in_index": 3, "pool_scales": (1, 2)},
    "UPerHead": {"in_channels": [8, 8, 8, 8], "in_index": [0, 1, 2, 3], "pool_scales": (1, 2)},
    "SegformerHead": {"in_channels": [8, 8, 8, 8], "in_index": [0, 1, 2, 3]},
}


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages[:1]:
            maps.append(stage(maps[-1]))
        return [*maps, maps[-1], maps[-1]]


def plain(name: str = "FCNHead") -> nn.Module:
    torch.manual_seed(0)
    MODELS.register_module("TestBackbone", module=Backbone, force=True)
    head = {
        "type": name,
        "channels": 16,
        "num_classes": K,
        "norm_cfg": {"type": "BN"},
        "loss_decode": {
            "type": "CrossEntropyLoss",
            "use_sigmoid": False,
            "avg_non_ignore": True,
        },
    }
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {"type": "TestBackbone"},
            "decode_head": head | HEADS[name],
            "test_cfg": {"mode": "whole"},
            "data_preprocessor": {"type": "mmseg.SegDataPreProcessor"},
        }
    )


def build(name: str = "FCNHead") -> nn.Module:
    return adapter.with_mcibi(plain(name), **SMALL)


def samples(labels: Tensor) -> list:
    found = []
    for label in labels:
        sample = SegDataSample(metainfo={"img_shape": tuple(label.shape)})
        sample.gt_sem_seg = PixelData(data=label[None])
        found.append(sample)
    return found


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    losses = model(images, samples(labels), mode="loss")
    assert {"decode.loss_ce", "decode.loss_pr"} < losses.keys()
    return model.parse_losses(losses)[0]


def plain_loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images, samples(labels), mode="loss")["decode.loss_ce"]


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images, mode="tensor")


@pytest.mark.slow
def test_fcn_learns_and_reloads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    check_training(model, loss_of, monkeypatch)
    check_evaluation(model, logits_of)
    saved = {"state_dict": checkpoints.weights_to_cpu(checkpoints.get_state_dict(model))}
    checkpoints.save_checkpoint(saved, str(tmp_path / "model.pth"))
    other = build()
    checkpoints.load_checkpoint(other, str(tmp_path / "model.pth"), strict=True)
    check_reload(model, other, logits_of)


@pytest.mark.slow
def test_with_accelerate_in_both_orders() -> None:
    check_accelerated(adapter, plain, loss_of, logits_of)


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_W(name: str) -> None:
    check_loss(build(name), loss_of, plain_loss_of)


@pytest.mark.slow
def test_the_librarys_optimiser_wrapper_accumulates(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.optim import OptimWrapper

    from tests.compat.memory_in_decoders import scenes

    model = build().train()
    memory = adapter.context_of(model).context.memory
    updates = []
    learn = type(memory)._learn
    monkeypatch.setattr(
        type(memory), "_learn", lambda self, *a: (updates.append(int(a[1])), learn(self, *a))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    for _ in range(4):
        with wrapper.optim_context(model):
            loss = loss_of(model, *scenes())
        wrapper.update_params(loss)
    assert updates == [1, 1]


def test_what_is_no_decode_head_is_named() -> None:
    with pytest.raises(ValueError, match="with_mcibi: Linear is not known; of mmseg"):
        adapter.with_mcibi(nn.Linear(1, 1))
