"""Backbones: strides and channels of timm models, weights from a file, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from mcibi_fast.models import create_backbone


@pytest.mark.parametrize(
    ("name", "output_stride", "size"),
    [
        ("test_resnet", 8, 40),
        ("test_resnet", 32, 64),
        ("test_efficientnet", 8, 40),
        ("convnext_atto", 8, 40),
        ("swin_tiny_patch4_window7_224", 32, 224),
    ],
)
def test_maps(name, output_stride, size):
    backbone = create_backbone(name, output_stride=output_stride).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, size, size))
    assert [m.shape[1] for m in maps] == backbone.channels
    assert [size // m.shape[2] for m in maps] == backbone.reductions
    assert all(m.shape[2] == m.shape[3] for m in maps)
    assert len(maps) == 4
    assert backbone.reductions[-1] == output_stride


def test_weights_from_a_file(tmp_path):
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = create_backbone("test_resnet", pretrained=tmp_path / "weights.pth")
    assert torch.equal(backbone.body.conv1[0].weight, model.conv1[0].weight)
    assert torch.equal(backbone.body.layer4[0].conv2.weight, model.layer4[0].conv2.weight)


def test_wrong_weights_are_refused(tmp_path):
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        RuntimeError, match=r"other\.pth for test_resnet.*none of the file's entries"
    ):
        create_backbone("test_resnet", pretrained=tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match=r"broken\.pth for test_resnet"):
        create_backbone("test_resnet", pretrained=tmp_path / "broken.pth")
    with pytest.raises(RuntimeError, match=r"no file .*nowhere"):
        create_backbone("test_resnet", pretrained=tmp_path / "nowhere")


def test_no_network_names_the_weights(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no network\nand a long explanation")

    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *a, **k: unreachable() if k.get("pretrained") else create(*a, **k),
    )
    with pytest.raises(RuntimeError) as error:
        create_backbone("test_resnet", pretrained=True)
    message = str(error.value)
    assert "timm/test_resnet.r160_in1k" in message
    assert "(no network)" in message
    assert "pretrained=PATH" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_of_mine", "timm has no model 'resnet_of_mine'"),
        ("vgg11", "vgg11 cannot run at output stride 8; pass output_stride=32"),
        ("swin_tiny_patch4_window7_224", "cannot run at output stride 8; pass output_stride=32"),
    ],
)
def test_refusals_say_what_to_do(name, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name)
