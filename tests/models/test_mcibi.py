"""MCIBI in every framework: its definition, losses, memory, stages, folding, saving, tracing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mcibi_fast import models
from mcibi_fast.models import MCIBIHead
from mcibi_fast.nn import RepresentationMemory
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.iterative import mix_logits, mix_probabilities
from tests.learning import share_left
from tests.models.disturbed import disturbed
from tests.models.stub_backbone import NAMES

K, Z = 5, 16
TINY = {"backbone": "test_resnet", "feats_channels": Z, "transform_channels": 8}
MODELS = {
    "fcn_mcibi": {},
    "fcn_mcibi paper": {"form": "paper"},
    "fcn_mcibi mean add": {"strategy": "mean", "fusion": "add"},
    "fcn_mcibi three": {"representations": 3},
    "fcn_mcibi paper two hard": {"form": "paper", "representations": 2, "hard": True},
    "pspnet_mcibi": {},
    "pspnet_mcibi downsample": {"downsample": True},
    "deeplabv3_mcibi": {"dilations": (1, 2)},
    "deeplabv3_mcibi two": {"dilations": (1, 2), "representations": 2},
    "upernet_mcibi": {},
    "upernet_mcibi aspp paper": {"context": "aspp", "form": "paper"},
    "isnet_mcibi": {},
    "isnet_mcibi weighted_add": {"fusion": "weighted_add"},
}
SEVERAL = [name for name in MODELS if "representations" in MODELS[name]]
ONE = [name for name in MODELS if name not in SEVERAL]


def build(name: str, **options):
    return models.create(name.split()[0], K, **TINY, **MODELS[name], **options)


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
    images = {name for name in NAMES if "_video_" not in name}
    assert {name for name in images if name.endswith("_mcibi")} == tested


# ---- the definition: every stage computes everything, nothing is split -----------------------


def from_scratch(model, images, stages):
    head, features = model.head, model.backbone(images)
    R = head.bottleneck(features[-1])
    W = head.context.weight_head(R)
    mix = mix_probabilities if head.mixing == "paper" else mix_logits
    logits = None
    for _ in range(stages):
        gather = W if logits is None else mix(W, logits)
        augmented = fuse(head.context, R, context(head.context, R, gather))
        logits = head.decoder(with_context(head, features, R, W, augmented))
    return logits


def context(module, R, logits):
    """C_bi: an attention for each of the n representations, then their 1x1 convolution."""
    weights = logits.softmax(1)
    if module.hard:
        weights = F.one_hot(logits.argmax(1), K).movedim(-1, 1).to(R.dtype)
    maps = [torch.einsum("bkyx,kz->bzyx", weights, M) for M in module.memory.memory.unbind(1)]
    if len(maps) > 1:
        parts = zip(module.attention.parts, maps, strict=True)
        return module.attention.join(torch.cat([part(R, C) for part, C in parts], dim=1))
    if module.downsample is not None:
        small = module.attention(module.downsample(R), module.downsample(maps[0]))
        return resize(small, R.shape[2:], False)
    return module.attention(R, maps[0])


def fuse(module, R, C):
    both = torch.cat([R, C], dim=1)
    if hasattr(module.fuse, "conv"):
        return module.fuse.conv(both)
    if not hasattr(module.fuse, "weights"):
        return R + C
    weights = module.fuse.weights(both).softmax(1)
    return weights[:, :1] * R + weights[:, 1:] * C


def with_context(head, features, R, W, augmented):
    """[attention(R, C_wi), R_aug] through Conv3x3-BN-ReLU; UperNet: its pyramid's maps first."""
    if head.within_image is None:
        return augmented
    isnet = type(head).__name__.startswith("ISNet")
    within = head.within_image(R, W) if isnet else head.within_image(features[-1])
    within = head.context_attention(R, within)
    if hasattr(head, "pyramid"):
        within = head.pyramid(features[:-1], within)
        augmented = F.interpolate(augmented, within.shape[2:], mode="bilinear")
    return head.context_fuse(torch.cat([within, augmented], dim=1))


@pytest.mark.parametrize("size", [(40, 48), (37, 51)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_is_the_definition(name, size, generator):
    model = disturbed(build(name), generator)
    images, _ = batch(generator, size, torch.float64)
    assert model(images).context_logits is None
    for stages in (1, 2):
        assert_equal(model(images, stages=stages).logits, from_scratch(model, images, stages))


@pytest.mark.parametrize("name", ONE)
@torch.no_grad()
def test_folded(name, generator):
    model = disturbed(build(name), generator)
    images, _ = batch(generator, dtype=torch.float64)
    folded = model.fold()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.head.modules())
    for stages in (1, 2):
        assert_equal(folded(images, stages=stages).logits, model(images, stages=stages).logits)
    assert not hasattr(folded, "memory")


def test_several_representations_are_not_folded():
    with pytest.raises(ValueError, match=r"fold: needs one representation per class"):
        build("fcn_mcibi three").fold()


# ---- training ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name, generator):
    images, labels = batch(generator)
    model = build(name, dropout=0.0)
    before = model.memory.memory.clone()
    assert not before.any()
    twin = copy.deepcopy(model)
    out = model(images, labels)
    assert set(out.losses) == {"loss_cls", "loss_pr", "loss_aux"}
    twin.memory.update(twin.pixel_representations(images).detach(), labels)
    torch.testing.assert_close(model.memory.memory, twin.memory.memory)
    assert model.memory.memory.any(2).any(1).all()
    model.schedule(epoch=1, lr_factor=0.5)
    out = model(images, labels)
    assert set(out.losses) == {"loss_cls", "loss_pr", "loss_aux", "loss_memory"}
    sum(out.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(images, labels).losses) == {"loss_cls", "loss_pr", "loss_aux"}


def test_memory_loss_is_the_cross_entropy_of_the_representations(generator):
    images, labels = batch(generator, dtype=torch.float64)
    options = {"representations": 2, "dropout": 0.0, "memory_loss_weight": 0.3}
    model = models.create("fcn_mcibi", K, **TINY, **options).double()
    for _ in range(3):
        model(images, labels)
    model.schedule(epoch=1, lr_factor=1.0)
    decoder = copy.deepcopy(model.head.decoder)
    out = model(images, labels)
    rows = model.memory.memory.reshape(2 * K, Z, 1, 1)  # after the update
    expected = 0.3 * F.cross_entropy(
        decoder(rows)[:, :, 0, 0], torch.arange(K).repeat_interleave(2)
    )
    assert_equal(out.losses["loss_memory"].detach(), expected.detach())
    loss = out.losses["loss_memory"]
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    reached = {
        n for (n, _), g in zip(model.named_parameters(), grads, strict=True) if g is not None
    }
    assert reached == {n for n, _ in model.named_parameters() if n.startswith("head.decoder.")}
    model.schedule(epoch=0, lr_factor=1.0)
    assert "loss_memory" not in model(images, labels).losses
    none = models.create("fcn_mcibi", K, **TINY, memory_loss_weight=0.0)
    none.schedule(epoch=5, lr_factor=1.0)
    assert "loss_memory" not in none(*batch(generator)).losses


def test_memory_loss_gradient(generator):
    model = models.create("fcn_mcibi", 3, **{**TINY, "feats_channels": 4}, dropout=0.0).double()
    model.memory.memory.normal_(generator=generator)
    model.schedule(epoch=1, lr_factor=1.0)
    head: MCIBIHead = model.head
    weights = [head.decoder.conv[0].weight, head.decoder.classifier.weight]

    def loss(*replaced):
        names = ("decoder.conv.0.weight", "decoder.classifier.weight")
        return torch.func.functional_call(_Loss(head), _prefixed(names, replaced), ())

    assert torch.autograd.gradcheck(loss, weights)


class _Loss(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self):
        return self.head.memory_losses(torch.float64)["loss_memory"]


def _prefixed(names, values):
    return {f"head.{name}": value for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("name", ["fcn_mcibi", "fcn_mcibi paper", "fcn_mcibi three"])
def test_training_lowers_the_losses(name, generator):
    images, labels = batch(generator, (32, 32))
    labels = labels[:, 8::8, 8::8].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :32, :32]
    model = build(name, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = []
    for step in range(24):
        model.schedule(epoch=step // 4, lr_factor=1 - step / 24)
        optimizer.zero_grad()
        losses = model(images, labels).losses
        sum(losses.values()).backward()
        optimizer.step()
        history.append({k: v.item() for k, v in losses.items()})
    assert share_left([losses["loss_cls"] for losses in history]) < 0.5
    assert share_left([losses["loss_memory"] for losses in history[4:]]) < 0.8


def test_momentum_follows_the_learning_rate(generator):
    model = build("fcn_mcibi")
    assert model.memory.momentum == 0.9
    model.schedule(epoch=3, lr_factor=0.25)
    assert model.memory.momentum == 0.9 * 0.25
    model.schedule(epoch=3, lr_factor=0.5)
    assert model.memory.momentum == 0.9 * 0.5
    fixed = build("fcn_mcibi", momentum=0.4, momentum_schedule="fixed")
    fixed.schedule(epoch=3, lr_factor=0.25)
    assert fixed.memory.momentum == 0.4
    models.create("fcn", K, backbone="test_resnet", feats_channels=8).schedule(
        epoch=1, lr_factor=0.5
    )


def test_without_update_representations_that_are_set_stay(generator):
    images, labels = batch(generator)
    model = build("fcn_mcibi", memory_update=False)
    model(images, labels.where(labels != 2, 255))
    first = model.memory.memory.clone()
    assert first[[0, 1, 3, 4]].any(2).all() and not first[2].any()
    model(images + 1, labels)
    assert torch.equal(model.memory.memory[[0, 1, 3, 4]], first[[0, 1, 3, 4]])
    assert model.memory.memory[2].any()  # set by the first pixels of its class


# ---- state, tracing, precisions ----------------------------------------------


@pytest.mark.parametrize("name", ["fcn_mcibi three", "upernet_mcibi"])
@torch.no_grad()
def test_saved_and_loaded(name, generator):
    model, other = disturbed(build(name), generator), build(name, init="pixel")
    images, _ = batch(generator, dtype=torch.float64)
    assert not other.memory.met.any()
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.memory.met.all()
    assert torch.equal(other.double().eval()(images).logits, model(images).logits)
    names = [key for key in model.state_dict() if "memory" in key]
    assert names == ["head.context.memory.memory"]
    assert isinstance(model.memory, RepresentationMemory)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"form": "paper"}, {"representations": 2}])
def test_training_compiles_in_one_graph_whatever_the_momentum(options, generator):
    features = [torch.randn(2, c, 5, 6, generator=generator) for c in (8, 12)]
    labels = torch.randint(0, K, (2, 40, 48), generator=generator)
    head = MCIBIHead(
        K, [8, 12], feats_channels=8, transform_channels=4, dropout=0.0, **options
    ).train()
    twin = copy.deepcopy(head)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for step in range(10):  # more than the compilations that PyTorch allows
        for each in (head, twin):
            each.schedule(epoch=step // 4, lr_factor=1 - step / 10)
        got, expected = compiled(features, labels).losses, twin(features, labels).losses
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.memory.memory, twin.memory.memory)


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_exported(folded, generator):
    model = build("upernet_mcibi", stages=2).eval()
    model.memory.memory.normal_(generator=generator)
    model = model.fold() if folded else model
    images, _ = batch(generator)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images).logits, model(images).logits)


@pytest.mark.parametrize("name", ["deeplabv3_mcibi", "fcn_mcibi three"])
def test_16_bit_and_autocast(name, generator):
    images, labels = batch(generator)
    model = build(name)
    model(images, labels)
    model.schedule(epoch=1, lr_factor=0.9)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, labels)
    sum(out.losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    half = copy.deepcopy(model).bfloat16()
    out = half(images.bfloat16(), labels)
    sum(out.losses.values()).backward()
    assert half.memory.memory.dtype == torch.float32
    with torch.no_grad():
        expected = model.eval()(images).logits
        logits = copy.deepcopy(model).bfloat16()(images.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_global_generator_is_left_alone(generator):
    images, labels = batch(generator)
    model = build("pspnet_mcibi", dropout=0.0)
    model.schedule(epoch=1, lr_factor=0.5)
    state = torch.get_rng_state()
    model(images, labels)
    model.eval()(images)
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"weights_from: 'cwi' needs a within-image head"):
        build("pspnet_mcibi", weights_from="cwi")
    with pytest.raises(ValueError, match=r"momentum: must be between 0 and 1, got 1\.5"):
        build("fcn_mcibi", momentum=1.5)
    with pytest.raises(ValueError, match=r"momentum_schedule.*'poly', got 'cosine'"):
        build("fcn_mcibi", momentum_schedule="cosine")
    with pytest.raises(ValueError, match=r"init.*'cluster', got 'zero'"):
        build("fcn_mcibi", init="zero")
    with pytest.raises(ValueError, match=r"downsample: needs one representation.* has 3"):
        build("fcn_mcibi three", downsample=True)
    with pytest.raises(ValueError, match=r"strategy: 'mean'"):
        build("fcn_mcibi three", strategy="mean")
    for option in ("noise", "unbiased", "extra"):
        with pytest.raises(TypeError, match=option):
            build("fcn_mcibi", **{option: True})
