"""Released checkpoints: recorded outputs and training steps, inferred architectures, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast import models
from mcibi_fast.compat import sssegmentation
from mcibi_fast.models import UperNetMCIBIPPHead
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.nn import ASPP, PPM


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
    gather = head.context.gather

    def recording(state, weight_logits):
        gathered.append(weight_logits)
        memory_out.append(gather(state, weight_logits))
        return memory_out[-1]

    head.context.gather = recording

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
    features = model.backbone(torch.as_tensor(recorded["images"]))
    assert len(features) == 4
    for i, feature in enumerate(features):
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
    gradients = {
        sssegmentation.released_name(backbones.released_name(name, model.backbone)): p.grad
        for name, p in model.named_parameters()
    }
    keys = [key for key in recorded if key.startswith("train_grad/")]
    assert len(keys) == 8
    for key in keys:
        grad = gradients[key.removeprefix("train_grad/")]
        assert relative_error(grad, recorded[key]) < 1e-10, key
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert relative_error(norm, recorded["train_grad_norm"]) < 1e-10


# ---- what no recorded model has: made from the recorded ASPP one -----------------------------


@pytest.fixture
def aspp(golden):
    return golden("mcibipp_aspp.npz")


def random_block(state, conv, bn, shape, generator):
    """Adds a convolution and its batch norm in evaluation mode."""
    state[f"{conv}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    for name in ("weight", "bias", "running_mean"):
        state[f"{bn}.{name}"] = torch.randn(shape[0], generator=generator)
    state[f"{bn}.running_var"] = torch.rand(shape[0], generator=generator) + 0.5


def block(state, conv, bn, x):
    """Convolution, batch norm, ReLU of a state dict's entries."""
    weight = state[f"{conv}.weight"].double()
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    statistics = (state[f"{bn}.{k}"].double() for k in ("running_mean", "running_var"))
    return F.batch_norm(
        x, *statistics, *(state[f"{bn}.{k}"].double() for k in ("weight", "bias"))
    ).relu()


def classify(state, name, x):
    hidden = block(state, f"{name}.conv1", f"{name}.bn1", x)
    return F.conv2d(hidden, *(state[f"{name}.conv2.{k}"].double() for k in ("weight", "bias")))


def run_head(state, recorded, **options):
    """The head's output, and R_aug as it computed it."""
    head = sssegmentation.head(state, **options).double()
    augmented = []
    head.context.fuse.register_forward_hook(lambda _m, _a, out: augmented.append(out))
    with torch.no_grad():
        return head([torch.as_tensor(recorded[f"backbone{i}"]) for i in range(4)]), augmented[0]


@pytest.mark.parametrize("weights_from", ["auto", "pr"])
@pytest.mark.parametrize("scales", [(1, 2, 3, 6), (1, 4)])
def test_pyramid_pooling_checkpoint(aspp, scales, weights_from, generator):
    state = state_dict(aspp)
    Z, C = state["bottleneck.0.weight"].shape[:2]
    module = "context_within_image_module"
    state = {k: v for k, v in state.items() if not k.startswith(module)}
    for i in range(len(scales)):
        prefix = f"{module}.branches.{i}"
        random_block(state, f"{prefix}.1", f"{prefix}.2", (Z, C, 1, 1), generator)
    shape = (Z, C + len(scales) * Z, 3, 3)
    random_block(state, f"{module}.bottleneck.0", f"{module}.bottleneck.1", shape, generator)
    for decoder, kernel in (("pr", 3), ("cwi", 3), ("cls", 1)):
        width = state[f"decoder_{decoder}.conv1.weight"].shape[1]
        prefix = f"decoder_{decoder}"
        shape = (Z, width, kernel, kernel)
        random_block(state, f"{prefix}.conv1", f"{prefix}.bn1", shape, generator)
    out, augmented = run_head(state, aspp, pool_scales=scales, weights_from=weights_from)

    features = torch.as_tensor(aspp["backbone3"])
    branches = [features]
    for i, scale in enumerate(scales):
        prefix = f"{module}.branches.{i}"
        pooled = block(state, f"{prefix}.1", f"{prefix}.2", F.adaptive_avg_pool2d(features, scale))
        branches.append(F.interpolate(pooled, features.shape[2:], mode="bilinear"))
    bottleneck = (f"{module}.bottleneck.0", f"{module}.bottleneck.1")
    within = block(state, *bottleneck, torch.cat(branches, 1))
    R = torch.as_tensor(aspp["stage1_pixel_representations"])
    assert relative_error(out.weight_logits, classify(state, "decoder_pr", R)) < 1e-10
    assert relative_error(out.context_logits, classify(state, "decoder_cwi", within)) < 1e-10
    logits = classify(state, "decoder_cls", torch.cat([augmented, within], 1))
    assert relative_error(out.logits, logits) < 1e-10


def add_extra_attention(state, width, generator):
    Z, T = state["bottleneck.0.weight"].shape[0], width
    for name, shapes in {
        "query": [(T, Z), (T, T)],
        "key": [(T, Z), (T, T)],
        "value": [(T, Z)],
        "out": [(Z, T)],
    }.items():
        for i, shape in enumerate(shapes):
            prefix = f"self_attention.{name}_project" + (f".{i}" if len(shapes) > 1 else "")
            random_block(state, f"{prefix}.0", f"{prefix}.1", (*shape, 1, 1), generator)


def extra_attention(state, query_features, key_features):
    def project(name, x, count):
        for i in range(count):
            prefix = f"self_attention.{name}_project" + (f".{i}" if count > 1 else "")
            x = block(state, f"{prefix}.0", f"{prefix}.1", x)
        return x

    query = project("query", query_features, 2).flatten(2).mT  # (B, N, T)
    key = project("key", key_features, 2).flatten(2)
    value = project("value", key_features, 1).flatten(2).mT
    gathered = (query @ key / query.shape[2] ** 0.5).softmax(2) @ value
    return project("out", gathered.mT.unflatten(2, query_features.shape[2:]), 1)


def within_image(recorded):
    """The recorded ASPP's output."""
    plain = sssegmentation.head(state_dict(recorded)).double()
    return plain.within_image(torch.as_tensor(recorded["backbone3"])).detach()


def test_extra_attention_checkpoint(aspp, generator):
    state = state_dict(aspp)
    add_extra_attention(state, 8, generator)
    out, augmented = run_head(state, aspp)
    assert relative_error(augmented, aspp["stage1_memory_out"]) < 1e-10
    within = within_image(aspp)
    expected = torch.cat([extra_attention(state, within, augmented), within], 1)
    assert relative_error(out.logits, classify(state, "decoder_cls", expected)) < 1e-10
    assert relative_error(out.logits, aspp["stage1_logits"]) > 1e-3


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("memory_joins", ["before", "after"])
def test_upernet_checkpoint(aspp, memory_joins, extra, generator):
    state = state_dict(aspp)
    Z, K = state["bottleneck.0.weight"].shape[0], state["memory_module.memory"].shape[0]
    top = 2 * Z if memory_joins == "before" else Z
    features = [torch.as_tensor(aspp[f"backbone{i}"]) for i in range(4)]
    for i, feature in enumerate(features[:3]):
        shape = (top, feature.shape[1], 1, 1)
        random_block(state, f"lateral_convs.{i}.0", f"lateral_convs.{i}.1", shape, generator)
        shape = (Z, top, 3, 3)
        random_block(state, f"fpn_convs.{i}.0", f"fpn_convs.{i}.1", shape, generator)
    shape = (Z, 5 * Z, 3, 3)
    random_block(state, "decoder_cls.conv1", "decoder_cls.bn1", shape, generator)
    if extra:
        add_extra_attention(state, 8, generator)
    out, augmented = run_head(state, aspp)
    assert relative_error(augmented, aspp["stage1_memory_out"]) < 1e-10

    within = within_image(aspp)
    if extra:
        augmented = extra_attention(state, within, augmented)
    maps = [
        block(state, f"lateral_convs.{i}.0", f"lateral_convs.{i}.1", f)
        for i, f in enumerate(features[:3])
    ]
    maps.append(torch.cat([augmented, within], 1) if memory_joins == "before" else within)
    for i in (2, 1, 0):
        maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="bilinear")
    for i in range(3):
        maps[i] = block(state, f"fpn_convs.{i}.0", f"fpn_convs.{i}.1", maps[i])
    if memory_joins == "after":
        maps.append(augmented)
    size = maps[0].shape[2:]
    expected = torch.cat([F.interpolate(m, size, mode="bilinear") for m in maps], 1)
    assert out.logits.shape == (len(expected), K, *size)
    assert relative_error(out.logits, classify(state, "decoder_cls", expected)) < 1e-10


def test_a_pyramid_needs_a_context(fcn):
    state = {**fcn, "lateral_convs.0.0.weight": torch.zeros(32, 32, 1, 1)}
    with pytest.raises(ValueError, match=r"lateral_convs\.\*\) but no context_within_image_module"):
        sssegmentation.head(state)


def test_pool_scales_that_do_not_fit_are_named(published):
    with torch.device("meta"), pytest.raises(ValueError, match=r"pool_scales.* 4 .*\(1, 2, 3\)"):
        sssegmentation.head(
            published["mcibiplusplus_ppm_resnet50os8_cityscapes"], pool_scales=(1, 2, 3)
        )


def test_load_from_a_file(fcn, tmp_path):
    torch.save({"model": fcn, "epoch": 3}, tmp_path / "checkpoint.pth")
    model = sssegmentation.load(tmp_path / "checkpoint.pth")
    assert not model.training
    assert torch.equal(model.memory.memory, fcn["memory_module.memory"])


@pytest.fixture(scope="module")
def published(published_shapes) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of the published configurations, without their values."""
    return {
        name: {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for name, shapes in published_shapes.items()
    }


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("mcibiplusplus_resnet50os8_ade20k", [3, 4, 6, 3]),
        ("mcibiplusplus_aspp_resnet50os8_ade20k", [3, 4, 6, 3]),
        ("mcibiplusplus_ppm_resnet50os8_ade20k", [3, 4, 6, 3]),
        ("mcibiplusplus_ppm_resnet50os8_cityscapes", [3, 4, 6, 3]),
        ("mcibiplusplus_aspp_resnet50os8_cityscapes", [3, 4, 6, 3]),
        ("mcibiplusplus_aspp_resnet50os8_lip", [3, 4, 6, 3]),
        ("mcibiplusplus_aspp_resnet101os8_cityscapes", [3, 4, 23, 3]),
        ("mcibiplusplus_upernet_resnet50os8_ade20k", [3, 4, 6, 3]),
        ("mcibiplusplus_upernet_resnet101os8_ade20k", [3, 4, 23, 3]),
        ("mcibiplusplus_upernet_resnet50os8_vspw", [3, 4, 6, 3]),
    ],
)
def test_published_architectures(published, name, depths):
    with torch.device("meta"):
        model = sssegmentation.load({"model": published[name]})
    body = model.backbone.body
    assert [len(body[f"layer{i}"]) for i in (1, 2, 3, 4)] == depths
    assert model.backbone.channels == [256, 512, 1024, 2048]
    classes = {"ade20k": 150, "cityscapes": 19, "lip": 20, "vspw": 124}[name.rpartition("_")[2]]
    assert (model.memory.num_classes, model.memory.channels) == (classes, 512)
    context = {"ppm": PPM, "aspp": ASPP, "upernet": ASPP}.get(name.split("_")[1], type(None))
    if name == "mcibiplusplus_upernet_resnet50os8_ade20k":
        context = PPM
    assert type(model.head.within_image) is context
    assert isinstance(model.head, UperNetMCIBIPPHead) == ("upernet" in name)
    assert body["layer4"][1].conv2.dilation == (4, 4)


def test_a_published_head_without_its_backbone(published):
    with torch.device("meta"):
        head = sssegmentation.head(published["mcibiplusplus_aspp_hrnetv2w48_cityscapes"])
    assert head.auxiliary is None
    assert head.context.downsample is not None
    assert head.within_image_head.conv[0].kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("name", "widths", "extra"),
    [
        ("mcibiplusplus_upernet_swinlarge_ade20k", [192, 384, 768], True),
        ("mcibiplusplus_upernet_resnest101os8_ade20k", [256, 512, 1024], False),
    ],
)
def test_published_upernet_heads(published, name, widths, extra):
    with torch.device("meta"):
        head = sssegmentation.head(published[name])
    assert isinstance(head, UperNetMCIBIPPHead)
    assert head.memory_joins == "before"
    assert [lateral[0].in_channels for lateral in head.pyramid.laterals] == widths
    assert (head.extra_attention is not None) == extra


@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [
        ("upernet_swinlarge_ade20k", [192, 384, 768, 1536], [4, 8, 16, 32]),
        ("aspp_hrnetv2w48_cityscapes", [720], [4]),
        ("upernet_resnest101os8_ade20k", [256, 512, 1024, 2048], [4, 8, 8, 8]),
    ],
)
def test_published_models_with_other_backbones(published, name, channels, reductions):
    with torch.device("meta"):
        model = sssegmentation.load({"model": published[f"mcibiplusplus_{name}"]})
    assert model.backbone.channels[-len(channels) :] == channels
    assert model.backbone.reductions[-len(channels) :] == reductions


@pytest.mark.parametrize(
    ("name", "framework", "options"),
    [
        ("resnet50os8_ade20k", "fcn", {}),
        ("ppm_resnet50os8_ade20k", "pspnet", {"extra_attention": True, "kernel_sizes": (1, 1, 1)}),
        ("ppm_resnet50os8_cityscapes", "pspnet", {"kernel_sizes": (3, 3, 3)}),
        ("aspp_resnet50os8_lip", "deeplabv3", {"extra_attention": True, "kernel_sizes": (1, 1, 1)}),
        ("aspp_resnet101os8_cityscapes", "deeplabv3", {"extra_attention": True}),
        ("upernet_resnet50os8_ade20k", "upernet", {}),
        ("upernet_resnet50os8_vspw", "upernet", {"context": "aspp"}),
    ],
)
def test_frameworks_hold_published_checkpoints(published, name, framework, options):
    """Made by its options, with no checkpoint at hand, a head has the checkpoint's entries."""
    with torch.device("meta"):
        loaded = sssegmentation.head(published[f"mcibiplusplus_{name}"])
        classes = loaded.memory.num_classes
        model = models.create(f"{framework}_mcibipp", classes, "resnet50", **options)
    assert {k: v.shape for k, v in model.head.state_dict().items()} == {
        k: v.shape for k, v in loaded.state_dict().items()
    }


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
    with pytest.raises(
        ValueError, match=r"memory_module\.\S+ is missing.*not an MCIBI\+\+ checkpoint"
    ):
        sssegmentation.head(without_memory)
    many = {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"extra\.0, .* and 4 more"):
        sssegmentation.head({**fcn, **many})


def test_files_that_are_no_checkpoints_are_named(tmp_path, fcn):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        sssegmentation.load(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"torch cannot load .*text\.pth"):
        sssegmentation.load(tmp_path / "text.pth")
    with pytest.raises(ValueError, match=r'expected {"model": state_dict}'):
        sssegmentation.load(fcn)
