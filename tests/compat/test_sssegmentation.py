"""Released checkpoints: recorded outputs and training steps, inferred architectures, errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from mcibi_fast.compat import sssegmentation


def relative_error(value, expected) -> float:
    expected = torch.as_tensor(expected)
    return float((value - expected).abs().max() / expected.abs().max())


def state_dict(recorded) -> dict[str, torch.Tensor]:
    prefix = "sd/"
    return {
        key.removeprefix(prefix): torch.as_tensor(value)
        for key, value in recorded.items()
        if key.startswith(prefix)
    }


@pytest.fixture(scope="module", params=["mcibipp_fcn.npz", "mcibipp_aspp.npz"])
def recorded(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def fcn(golden) -> dict[str, torch.Tensor]:
    return state_dict(golden("mcibipp_fcn.npz"))


@torch.no_grad()
def test_head_reproduces_every_stage(recorded):
    head = sssegmentation.head(state_dict(recorded)).double()
    features = [torch.as_tensor(recorded[f"backbone{i}"]) for i in range(4)]
    gathered, memory_out = [], []
    head.context.fuse.register_forward_hook(lambda _m, _a, out: memory_out.append(out))
    aggregate = head.context.aggregate
    head.context.aggregate = lambda R, W: (gathered.append(W), aggregate(R, W))[1]

    def agrees(value, key):
        assert relative_error(value, recorded[key]) < 1e-10, key

    first = head(features)
    agrees(head.pixel_representations(features), "stage1_pixel_representations")
    agrees(first.weight_logits, "stage1_preds_pr")
    if "stage1_preds_cwi" in recorded:
        agrees(first.context_logits, "stage1_preds_cwi")
    agrees(gathered[-1], "stage1_memory_gather_logits_used")
    agrees(memory_out[-1], "stage1_memory_out")
    agrees(first.logits, "stage1_logits")

    second = head(features, previous_logits=first.logits)
    agrees(gathered[-1], "stage2_gather_logits")
    agrees(second.logits, "stage2_logits")
    agrees(second.logits, "cascade_times2_probs0")
    agrees(head(features, previous_logits=second.logits).logits, "stage3_logits")
    for stages in (1, 2, 3):
        agrees(head(features, stages=stages).logits, f"stage{stages}_logits")
    cascade = head(features, previous_logits=first.logits.softmax(1))
    agrees(cascade.logits.softmax(1), "cascade_times2_probs1")
    head.stage_weights = (1, 1)
    agrees(head(features, stages=2).logits, "stage2_logits_w1_1")


@torch.no_grad()
def test_backbone(recorded):
    model = sssegmentation.load({"model": state_dict(recorded)}).double()
    for i, feature in enumerate(model.backbone(torch.as_tensor(recorded["images"]))):
        assert relative_error(feature, recorded[f"backbone{i}"]) < 1e-10


def test_training_step(recorded):
    model = sssegmentation.load({"model": state_dict(recorded)}, dropout=0.0, ignore_index=-100)
    model = model.double().train()
    out = model(torch.as_tensor(recorded["images"]), torch.as_tensor(recorded["labels"]))
    total = sum(out.losses.values())
    total.backward()
    losses = {key for key in recorded if key.startswith("train_loss_")} - {"train_loss_total"}
    assert {f"train_{name}" for name in out.losses} == losses
    for name, loss in out.losses.items():
        assert relative_error(loss.detach(), recorded[f"train_{name}"]) < 1e-10
    assert relative_error(total.detach(), recorded["train_loss_total"]) < 1e-10
    assert relative_error(model.memory.memory, recorded["train_memory_after"]) < 1e-10
    gradients = {sssegmentation.released_name(name): p.grad for name, p in model.named_parameters()}
    for key in recorded:
        if key.startswith("train_grad/"):
            grad = gradients[key.removeprefix("train_grad/")]
            assert relative_error(grad, recorded[key]) < 1e-10, key
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert relative_error(norm, recorded["train_grad_norm"]) < 1e-10


def test_load_from_a_file(fcn, tmp_path):
    torch.save({"model": fcn, "epoch": 3}, tmp_path / "checkpoint.pth")
    model = sssegmentation.load(tmp_path / "checkpoint.pth")
    assert not model.training
    assert torch.equal(model.memory.memory, fcn["memory_module.memory"])


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of the published configurations, without their values."""
    path = Path(__file__).parents[3] / "shared" / "golden" / "released_state_dict_shapes.json.gz"
    if not path.is_file():
        pytest.skip("needs the shapes of the published checkpoints in ../shared/golden")
    with gzip.open(path, "rt") as file:
        configurations = json.load(file)
    return {
        name: {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for name, shapes in configurations.items()
    }


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("mcibiplusplus_resnet50os8_ade20k", [3, 4, 6, 3]),
        ("mcibiplusplus_aspp_resnet50os8_ade20k", [3, 4, 6, 3]),
    ],
)
def test_published_architectures(published, name, depths):
    with torch.device("meta"):
        model = sssegmentation.load({"model": published[name]})
    body = model.backbone.body
    assert [len(body[f"layer{i}"]) for i in (1, 2, 3, 4)] == depths
    assert model.backbone.channels == [256, 512, 1024, 2048]
    assert (model.memory.num_classes, model.memory.channels) == (150, 512)
    assert body["layer4"][1].conv2.dilation == (4, 4)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mcibiplusplus_ppm_resnet50os8_cityscapes", "PPM"),
        ("mcibiplusplus_upernet_resnet50os8_ade20k", "UperNet"),
        ("mcibiplusplus_aspp_resnet50os8_cityscapes", "extra attention"),
        ("mcibiplusplus_upernet_swinlarge_ade20k", "not supported yet"),
        ("mcibiplusplus_aspp_hrnetv2w48_cityscapes", "HRNet"),
        ("mcibiplusplus_upernet_resnest101os8_ade20k", "not supported yet"),
    ],
)
def test_what_is_not_supported_says_so(published, name, what):
    with pytest.raises(NotImplementedError, match=what):
        sssegmentation.load({"model": published[name]})


def test_keys_that_do_not_fit_are_named(fcn):
    cut = {k: v for k, v in fcn.items() if k != "decoder_cls.conv2.bias"}
    with pytest.raises(ValueError, match=r"missing: decoder_cls\.conv2\.bias$"):
        sssegmentation.head(cut)
    with pytest.raises(ValueError, match=r"unexpected: decoder_new\.weight$"):
        sssegmentation.head({**fcn, "decoder_new.weight": torch.zeros(1)})
    reshaped = {**fcn, "decoder_pr.conv2.weight": torch.zeros(9, 16, 1, 1)}
    with pytest.raises(ValueError, match=r"decoder_pr\.conv2\.weight \(9, 16, 1, 1\) instead of"):
        sssegmentation.head(reshaped)
    with pytest.raises(ValueError, match=r"backbone_net\.layer2\.0\.bn1\.weight"):
        sssegmentation.load(
            {"model": {k: v for k, v in fcn.items() if k != "backbone_net.layer2.0.bn1.weight"}}
        )
    without_memory = {k: v for k, v in fcn.items() if not k.startswith("memory_module")}
    with pytest.raises(ValueError, match=r"memory_module\.\S+ is missing.*no MCIBI\+\+ checkpoint"):
        sssegmentation.head(without_memory)
    many = {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"extra\.0, .* and 4 more"):
        sssegmentation.head({**fcn, **many})


def test_files_that_are_no_checkpoints_are_named(tmp_path, fcn):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        sssegmentation.load(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth is not one torch can load"):
        sssegmentation.load(tmp_path / "text.pth")
    with pytest.raises(ValueError, match=r'expected {"model": state_dict}'):
        sssegmentation.load(fcn)
