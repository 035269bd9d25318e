"""Every framework with and without MCIBI++: shapes, training, stages, folding, saving, options.

With MCIBI: test_mcibi.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_fast import models
from mcibi_fast.models import ISNetMCIBIPPHead
from mcibi_fast.models.upernet import FeaturePyramid
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.nn.iterative import mix_logits, mix_probabilities
from mcibi_fast.ops import upsample_cross_entropy
from tests.models.disturbed import disturbed
from tests.models.stub_backbone import NAMES, stubbed

K, Z = 5, 16
TINY = {"backbone": "test_resnet", "feats_channels": Z}
# Each framework in the forms that differ in structure.
MODELS = {
    "fcn": {},
    "pspnet": {},
    "deeplabv3": {"dilations": (1, 2)},
    "upernet": {},
    "upernet aspp": {"context": "aspp"},
    "isnet": {"transform_channels": 8},
    "fcn_mcibipp": {},
    "pspnet_mcibipp": {},
    "pspnet_mcibipp paper": {"form": "paper"},
    "pspnet_mcibipp kernels": {"kernel_sizes": (3, 5, 1)},
    "upernet_mcibipp kernels": {"kernel_sizes": (3, 3, 1)},
    "deeplabv3_mcibipp": {"dilations": (1, 2)},
    "deeplabv3_mcibipp attention": {"dilations": (1, 2), "extra_attention": True},
    "upernet_mcibipp": {},
    "upernet_mcibipp paper attention": {"form": "paper", "extra_attention": True},
    "upernet_mcibipp aspp after": {"context": "aspp", "memory_joins": "after"},
    "upernet_mcibipp after attention": {"memory_joins": "after", "extra_attention": True},
    "isnet_mcibipp": {},
    "isnet_mcibipp paper attention": {"form": "paper", "extra_attention": True},
}
MCIBIPP = [name for name in MODELS if "mcibipp" in name]


def build(name: str, **options):
    """A small model of the table above."""
    width = {"transform_channels": 8} if name in MCIBIPP else {}
    return models.create(name.split()[0], K, **TINY, **width, **MODELS[name], **options)


def batch(generator, size=(40, 48), dtype=torch.float32):
    images = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(0, K, (2, *size), generator=generator)
    labels[:, :3] = 255
    return images, labels


def assert_equal(value, expected):
    assert value.shape == expected.shape
    assert float((value - expected).abs().max() / expected.abs().max()) < 1e-10


def test_all_frameworks_are_in_the_table():
    tested = {name.split()[0] for name in MODELS}
    elsewhere = {name for name in NAMES if name.endswith("_mcibi") or "_video_" in name}
    assert set(NAMES) - elsewhere == tested


@pytest.mark.parametrize("size", [(40, 48), (37, 51)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
@pytest.mark.thinned
def test_output(name, size, generator):
    images, labels = batch(generator, size)
    model = build(name).eval()
    out = model(images)
    coarse = tuple(-(-s // 8) for s in size)
    finest = tuple(-(-s // 4) for s in size) if "upernet" in name else coarse
    assert out.logits.shape == (2, K, *finest)
    assert out.losses == {}
    assert torch.equal(model(images).logits, out.logits)
    of_r = coarse if name in MCIBIPP else finest
    assert model.pixel_representations(images).shape == (2, Z, *of_r)
    losses = {"loss_cls", "loss_aux"}
    if name in MCIBIPP or name == "isnet":
        losses.add("loss_pr")
    if name in MCIBIPP and name != "fcn_mcibipp":
        losses.add("loss_cwi")
    assert set(model(images, labels).losses) == losses


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name, generator):
    images, labels = batch(generator)
    model = build(name, dropout=0.0)
    twin = copy.deepcopy(model)
    sum(model(images, labels).losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for n, p in model.named_parameters() if "classifier" in n)
    if name not in MCIBIPP:
        assert not hasattr(model, "memory")
        return
    before = twin.memory.memory.clone()
    assert not torch.equal(model.memory.memory, before)
    twin.memory.update(twin.pixel_representations(images).detach(), labels)
    torch.testing.assert_close(model.memory.memory, twin.memory.memory)
    expected = model.memory.memory.clone()
    model(images)
    model.eval()(images, labels)
    assert torch.equal(model.memory.memory, expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_training_and_evaluation_classify_alike(name, generator):
    """What is prepared in halves for evaluation and whole for training is the same function."""
    model = disturbed(build(name, dropout=0.0), generator)
    images, _ = batch(generator, dtype=torch.float64)
    expected = model(images).logits
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | GaussianMemory):  # which differ in training
            module.eval()
    assert_equal(model(images).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_without_an_auxiliary_head(name, generator):
    images, labels = batch(generator)
    model = build(name, auxiliary_weight=0.0)
    assert "loss_aux" not in model(images, labels).losses
    assert not any("auxiliary" in key for key in model.state_dict())


# ---- the logits as the papers draw them: every stage computes everything, nothing is split -----


def pyramid_of(pyramid: FeaturePyramid, features, top):
    maps = [lateral(f) for lateral, f in zip(pyramid.laterals, features, strict=True)] + [top]
    for i in (2, 1, 0):
        maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="bilinear")
    maps = [*(output(m) for output, m in zip(pyramid.outputs, maps, strict=False)), top]
    finest = maps[0].shape[2:]
    return torch.cat([F.interpolate(m, finest, mode="bilinear") for m in maps], dim=1)


def within_of(head, features, R, weight_logits):
    if isinstance(head, ISNetMCIBIPPHead):
        return head.within_image(R, weight_logits)
    return None if head.within_image is None else head.within_image(features[-1])


def classify_from_scratch(head, features, augmented, within):
    if within is None:
        return head.decoder(augmented)
    both = torch.cat([augmented, within], dim=1)
    if not hasattr(head, "pyramid"):
        return head.decoder(both)
    if head.memory_joins == "before":
        return head.decoder(pyramid_of(head.pyramid, features[:-1], both))
    maps = pyramid_of(head.pyramid, features[:-1], within)
    resized = F.interpolate(augmented, maps.shape[2:], mode="bilinear")
    return head.decoder(torch.cat([maps, resized], dim=1))


def from_scratch(model, images, stages):
    head, features = model.head, model.backbone(images)
    R = head.bottleneck(features[-1])
    W = head.context.weight_head(R)
    within = within_of(head, features, R, W)
    if head.weights_from == "cwi":
        W = head.within_image_head(within)
    mix = mix_probabilities if head.mixing == "paper" else mix_logits
    logits = None
    for _ in range(stages):
        gather = W if logits is None else mix(W, logits)
        C = head.context.attention(R, head.context.memory.aggregate(gather))  # Eqs. 12, 13
        augmented = head.context.fuse.conv(torch.cat([R, C], dim=1))
        if head.extra_attention is not None:
            augmented = head.extra_attention(within, augmented)
        logits = classify_from_scratch(head, features, augmented, within)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("size", [(40, 48), (37, 51)])
@pytest.mark.parametrize("name", MCIBIPP)
@torch.no_grad()
@pytest.mark.thinned
def test_stages_that_reuse_equal_stages_from_scratch(name, size, generator):
    model = disturbed(build(name), generator)
    images, _ = batch(generator, size, torch.float64)
    for stages in (1, 2, 3):
        expected = from_scratch(model, images, stages)
        assert_equal(model(images, stages=stages).logits, expected)
    previous = model(images, stages=2).logits
    assert_equal(model.head(model.backbone(images), previous_logits=previous).logits, expected)
    assert not torch.equal(model(images).logits, previous)


@torch.no_grad()
def test_upernet_is_a_pyramid_over_the_context(generator):
    model = disturbed(build("upernet"), generator)
    images, _ = batch(generator, (37, 51), torch.float64)
    head, features = model.head, model.backbone(images)
    maps = pyramid_of(head.pyramid, features[:-1], head.within_image(features[-1]))
    assert maps.shape[1] == 4 * Z
    assert_equal(model(images).logits, head.decoder(maps))


@torch.no_grad()
def test_isnet_shares_r_and_its_first_prediction(generator):
    """Without MCIBI++ the logits classify the context; with it that context is C_wi."""
    images, labels = batch(generator, dtype=torch.float64)
    plain = disturbed(build("isnet", first_weight=0.3), generator)
    features = plain.backbone(images)
    R = plain.head.bottleneck(features[-1])
    first = plain.head.first_decoder(R)
    context = plain.head.within_image(R, first)
    out = plain(images, labels)
    assert_equal(out.logits, plain.head.decoder.classifier(context))
    assert_equal(out.losses["loss_pr"], 0.3 * upsample_cross_entropy(first, labels))
    assert out.weight_logits is None
    ours = disturbed(build("isnet_mcibipp"), generator)
    features = ours.backbone(images)
    R = ours.pixel_representations(images)
    out = ours(images)
    assert_equal(out.weight_logits, ours.head.context.weight_head(R))
    within = ours.head.within_image(R, out.weight_logits)
    assert_equal(out.context_logits, ours.head.within_image_head(within))


def convolutions(run) -> int:
    """Multiply-adds of the convolutions that ``run`` computes."""
    total = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal total
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default:
                total += args[1][0].numel() * out.numel()
            return out

    with torch.no_grad(), Count():
        run()
    return total


@pytest.mark.parametrize("name", ["upernet_mcibipp", "upernet_mcibipp aspp after"])
def test_a_stage_computes_only_what_the_weights_change(name, generator):
    model = build(name, auxiliary_weight=0.0).eval()
    images, _ = batch(generator)
    head, features = model.head, model.backbone(images)
    costs = [convolutions(lambda s=s: head(features, stages=s)) for s in (1, 2, 3)]
    whole = convolutions(lambda: from_scratch(model, images, 1))
    assert costs[0] == whole - convolutions(lambda: model.backbone(images))
    state = head.context.prepare(head.pixel_representations(features))
    stage = convolutions(lambda: head.context.gather(state, torch.zeros(2, K, 5, 6)))
    sizes = [m.shape[2] * m.shape[3] for m in features[:-1]]
    if head.memory_joins == "before":  # half of the pyramid, 4 of the 5 maps that are classified
        stage += 2 * 9 * Z * Z * (sum(sizes) + 4 * sizes[0])
    else:  # one of the 5
        stage += 2 * 9 * Z * Z * sizes[0]
    stage += 2 * K * Z * sizes[0]
    assert costs[2] - costs[1] == costs[1] - costs[0] == stage


@pytest.mark.parametrize("name", MCIBIPP)
@torch.no_grad()
def test_folded_is_equal(name, generator):
    model = disturbed(build(name), generator)
    images, _ = batch(generator, (37, 51), torch.float64)
    folded = model.fold()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for stages in (1, 3):
        got, expected = folded(images, stages=stages), model(images, stages=stages)
        assert_equal(got.logits, expected.logits)
        assert_equal(got.weight_logits, expected.weight_logits)
    if expected.context_logits is not None:
        assert_equal(got.context_logits, expected.context_logits)
    with pytest.raises(RuntimeError, match=r"a folded model is for inference"):
        folded.train()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MCIBIPP])
def test_baselines_cannot_be_folded(name):
    with pytest.raises(TypeError, match=r"fold: \w+Head has no memory"):
        build(name).fold()


@pytest.mark.parametrize("name", MODELS)
def test_16_bit_and_channels_last(name, generator):
    images, labels = batch(generator)
    model = build(name).eval()
    with torch.no_grad():
        expected = model(images).logits
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        logits = last(images.to(memory_format=torch.channels_last)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        logits = copy.deepcopy(model).bfloat16()(images.bfloat16()).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(images, labels)
    sum(out.losses.values()).backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upernet_mcibipp", "isnet_mcibipp"])
@torch.no_grad()
def test_compiled_in_one_graph_and_exported(name, generator, monkeypatch):
    with stubbed(monkeypatch):  # test_fcn.py traces a real backbone
        model = build(name, stages=2).eval()
    images, _ = batch(generator)
    expected = model(images).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).logits, expected)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images).logits, expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded(name, generator):
    model, other = disturbed(build(name), generator), build(name)
    images, _ = batch(generator, dtype=torch.float64)
    expected = model(images).logits
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.double().eval()(images).logits, expected)
    names = [key for key in model.state_dict() if "memory" in key]
    assert names == (["head.context.memory.memory"] if name in MCIBIPP else [])


def test_wrong_options_are_named():
    for name in ("upernet", "upernet_mcibipp"):
        with pytest.raises(ValueError, match=r"context: expected 'ppm' or 'aspp', got 'spp'"):
            models.create(name, K, **TINY, context="spp")
    with pytest.raises(ValueError, match=r"memory_joins: expected 'before' or 'after'.*'inside'"):
        build("upernet_mcibipp", memory_joins="inside")
    for sizes in ((1, 3), (1, 2, 3), (1, 1, -1)):
        with pytest.raises(ValueError, match=r"kernel_sizes: expected three odd sizes"):
            build("fcn_mcibipp", kernel_sizes=sizes)
    with pytest.raises(ValueError, match=r"extra_attention: needs a within-image context"):
        build("fcn_mcibipp", extra_attention=True)
    for name in NAMES:
        with pytest.raises(TypeError, match=r"colour"):
            models.create(name, K, **TINY, colour=1)
    head = build("upernet").head.eval()
    with pytest.raises(ValueError, match=r"this pyramid has 3 maps below the top one, got 2"):
        head([torch.zeros(1, c, 4, 4) for c in (48, 192, 96)])
