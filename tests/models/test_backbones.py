"""Backbones: strides and channels of timm models, weights from a file, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from mcibi_fast.models import create, create_backbone, set_drop_path
from mcibi_fast.nn.fold import fold_batch_norms

SWIN = "swin_tiny_patch4_window7_224"
ANY_SIZE = [
    ("resnet18", 8),
    ("test_resnet", 32),
    ("resnet26d", 8),
    ("resnest14d", 8),
    ("hrnet_w18_small", 4),
    ("swin_tiny_patch4_window7_224", 32),
    ("swinv2_tiny_window8_256", 32),
    ("vit_tiny_patch16_224", 16),
    ("deit_tiny_patch16_224", 16),
    ("convnext_atto", 8),
    ("convnext_atto", 32),
    ("test_efficientnet", 8),
    ("pvt_v2_b0", 32),
]


@pytest.mark.parametrize(("name", "output_stride"), ANY_SIZE)
@torch.no_grad()
def test_maps_of_any_size(name, output_stride, generator):
    backbone = create_backbone(name, output_stride=output_stride).eval()
    assert len(backbone.channels) == 4 and backbone.reductions[-1] == output_stride
    for height, width in ((64, 96), (77, 51)):
        maps = backbone(torch.randn(2, 3, height, width, generator=generator))
        assert [m.shape[1] for m in maps] == backbone.channels
        for m, stride in zip(maps, backbone.reductions, strict=True):
            assert m.shape[2] in (height // stride, -(-height // stride))
            assert m.shape[3] in (width // stride, -(-width // stride))
            assert m.isfinite().all() and m.std() > 0


@pytest.mark.parametrize(
    ("name", "output_stride", "channels"),
    [
        ("resnet50", 8, [256, 512, 1024, 2048]),
        ("resnet50c", 8, [256, 512, 1024, 2048]),
        ("resnet101", 8, [256, 512, 1024, 2048]),
        ("resnest101e", 8, [256, 512, 1024, 2048]),
        ("resnest200e", 8, [256, 512, 1024, 2048]),
        ("resnest269e", 8, [256, 512, 1024, 2048]),
        ("hrnet_w48", 4, [720, 720, 720, 720]),
        ("swin_large_patch4_window12_384", 32, [192, 384, 768, 1536]),
        ("vit_large_patch16_384", 16, [1024, 1024, 1024, 1024]),
        ("convnext_large", 32, [192, 384, 768, 1536]),
    ],
)
def test_channels_of_the_papers_backbones(name, output_stride, channels):
    if not name.startswith(
        ("res", "hrnet")
    ):  # earlier releases of timm read numbers from tensors as they build these
        needs_models_without_data()
    with torch.device("meta"):
        backbone = create_backbone(name, output_stride=output_stride)
    assert backbone.channels == channels


def needs_models_without_data() -> None:
    try:
        with torch.device("meta"):
            timm.create_model("convnext_atto")
    except (RuntimeError, NotImplementedError):
        pytest.skip("needs a release of timm whose transformers can be built on the meta device")


@torch.no_grad()
def test_hrnet_gives_its_own_branches(generator):
    backbone = create_backbone("hrnet_w18_small", output_stride=4).double().eval()
    model = timm.create_model("hrnet_w18_small").double().eval()
    state = model.state_dict()
    backbone.body.load_state_dict({name: state[name] for name in backbone.body.state_dict()})
    images = torch.randn(1, 3, 64, 96, generator=generator, dtype=torch.float64)
    x = model.act1(model.bn1(model.conv1(images)))
    branches = model.stages(model.act2(model.bn2(model.conv2(x))))
    first, *_ = maps = backbone(images)
    assert all(m is first for m in maps)
    assert torch.equal(first[:, :16], branches[0])  # 64 x 96 needs no resizing but the last
    start = 16
    for branch in branches[1:]:
        resized = F.interpolate(branch, size=(16, 24), mode="bilinear", align_corners=False)
        assert torch.equal(first[:, start : start + branch.shape[1]], resized)
        start += branch.shape[1]
    assert start == first.shape[1]


@torch.no_grad()
def test_vit_gives_evenly_spaced_blocks(generator):
    backbone = create_backbone("vit_tiny_patch16_224", output_stride=16).eval()
    assert backbone.body.out_indices == [2, 5, 8, 11]
    images = torch.randn(1, 3, 48, 64, generator=generator)
    expected = backbone.body.model.forward_intermediates(
        images, indices=[2, 5, 8, 11], intermediates_only=True
    )
    assert all(torch.equal(*pair) for pair in zip(backbone(images), expected, strict=True))


@torch.no_grad()
def test_drop_path_grows_with_depth_to_the_rate():
    model = create("fcn", 3, SWIN, output_stride=32, drop_path=0.3, feats_channels=8)
    expected = timm.create_model(SWIN, features_only=True, drop_path_rate=0.3)
    rates, theirs = (
        [m.drop_prob for m in module.modules() if isinstance(m, timm.layers.DropPath)]
        for module in (model.backbone, expected)
    )
    assert rates == pytest.approx(theirs) and max(rates) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no stochastic depth"):
        create("fcn", 3, "test_resnet", drop_path=0.3)
    with pytest.raises(ValueError, match="drop_path: 1"):
        set_drop_path(model.backbone, 1)


def test_swin_shifts_in_every_stage():
    # At the size of pretraining the last stage is one window; in a larger image it is not.
    backbone = create_backbone("swin_tiny_patch4_window7_224", output_stride=32)
    shifts = {b.shift_size for b in backbone.modules() if hasattr(b, "shift_size")}
    assert shifts == {(0, 0), (3, 3)}
    assert backbone.body.layers_3.blocks[1].shift_size == (3, 3)


@pytest.mark.parametrize(
    ("name", "output_stride"), [("resnest14d", 8), ("hrnet_w18_small", 4), ("resnet18", 8)]
)
@torch.no_grad()
def test_folded_batch_norms_change_nothing(name, output_stride, generator):
    backbone = create_backbone(name, output_stride=output_stride).double().eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    images = torch.randn(1, 3, 75, 53, generator=generator, dtype=torch.float64)
    before = backbone(images)
    fold_batch_norms(backbone)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())
    for folded, expected in zip(backbone(images), before, strict=True):
        assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_weights_from_a_file(tmp_path):
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = create_backbone("test_resnet", pretrained=tmp_path / "weights.pth")
    assert torch.equal(backbone.body.conv1[0].weight, model.conv1[0].weight)
    assert torch.equal(backbone.body.layer4[0].conv2.weight, model.layer4[0].conv2.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output_stride", "entry", "timms"),
    [
        ("resnest14d", 8, "layer4.0.conv2.fc2.weight", "layer4.0.conv2.fc2.weight"),
        (
            "swin_tiny_patch4_window7_224",
            32,
            "layers_3.blocks.1.attn.qkv.weight",
            "layers.3.blocks.1.attn.qkv.weight",
        ),
        ("vit_tiny_patch16_224", 16, "model.blocks.11.mlp.fc2.weight", "blocks.11.mlp.fc2.weight"),
        (
            "convnext_atto",
            8,
            "stages_3.blocks.0.mlp.fc1.weight",
            "stages.3.blocks.0.mlp.fc1.weight",
        ),
    ],
)
def test_weights_of_other_families(tmp_path, name, output_stride, entry, timms):
    model = timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = create_backbone(
        name, output_stride=output_stride, pretrained=tmp_path / "weights.pth"
    )
    assert torch.equal(backbone.body.state_dict()[entry], model.state_dict()[timms])


def test_weights_of_hrnet_from_a_file(tmp_path):
    model = timm.create_model("hrnet_w18_small")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = create_backbone(
        "hrnet_w18_small", output_stride=4, pretrained=tmp_path / "weights.pth"
    )
    own = backbone.body.state_dict()
    assert all(torch.equal(own[name], model.state_dict()[name]) for name in own)


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
        ("hrnet_w18_small", "cannot run at output stride 8; pass output_stride=4"),
        ("vit_tiny_patch16_224", "cannot run at output stride 8; pass output_stride=16"),
    ],
)
def test_refusals_say_what_to_do(name, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name)
