"""Contexts within the image: each against its definition, written out by loops or in full."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_fast.nn.within_image import (
    ANN,
    ASPP,
    DNL,
    PPM,
    APCNet,
    CCNet,
    DANet,
    DMNet,
    EMANet,
    EncNet,
    GCNet,
    ISANet,
    NonLocal,
    PSANet,
)
from mcibi_fast.nn.within_image.ann import AFNB, APNB
from mcibi_fast.nn.within_image.apcnet import AdaptiveContext
from mcibi_fast.nn.within_image.ccnet import CrissCrossAttention
from mcibi_fast.nn.within_image.danet import ChannelAttention, PositionAttention
from mcibi_fast.nn.within_image.dnl import DisentangledNonLocal

SIZES = [(5, 7), (1, 6), (4, 1), (3, 3)]
CONTEXTS = {
    "ASPP": lambda: ASPP(6, 8, dilations=(1, 2, 3)),
    "PPM": lambda: PPM(6, 8),
    "CCNet": lambda: CCNet(6, 8),
    "DANet": lambda: DANet(6, 8, transform_channels=4),
    "ANN": lambda: ANN(5, 6, 8, transform_channels=4, pool_scales=(1, 2)),
    "DNL": lambda: DNL(6, 8, temperature=0.5),
    "APCNet": lambda: APCNet(6, 8),
    "NonLocal": lambda: NonLocal(6, 8),
    "GCNet": lambda: GCNet(6, 8),
    "EMANet": lambda: EMANet(6, 8, bases=3),
    "DMNet": lambda: DMNet(6, 8, filter_sizes=(1, 2, 3)),
    "EncNet": lambda: EncNet(6, 8, num_codes=3),
    "ISANet": lambda: ISANet(6, 8, transform_channels=4, block_size=(2, 3)),
    "PSANet": lambda: PSANet(6, 8, mask_size=(5, 3)),
}


def randomised(module, generator):
    """In float64 and evaluation mode, every parameter and statistic different from its default."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return module.double().eval()


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs_of(module, generator, size=(5, 7), batch=2):
    features = randn(generator, batch, 6, *size)
    return (features, randn(generator, batch, 5, *size)) if isinstance(module, ANN) else (features,)


def assert_equal(value, expected):
    assert value.shape == expected.shape
    error = float((value - expected).detach().abs().max() / expected.detach().abs().max())
    assert error < 1e-10


def project(conv, pixels):
    """A 1x1 convolution of rows of pixels (..., C)."""
    out = pixels @ conv.weight[:, :, 0, 0].T
    return out if conv.bias is None else out + conv.bias


def conv_bn(block, features):
    """Convolution and batch norm at evaluation, and ReLU if the block has one."""
    conv, bn, *activation = block
    out = F.conv2d(
        features, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    mean, var = bn.running_mean[:, None, None], bn.running_var[:, None, None]
    out = (out - mean) / (var + bn.eps).sqrt() * bn.weight[:, None, None] + bn.bias[:, None, None]
    return out.clamp(min=0) if activation else out


def as_rows(features):
    return features.movedim(1, -1).flatten(1, 2)  # (B, N, C)


def as_map(pixels, like):
    return pixels.unflatten(1, like.shape[2:]).movedim(-1, 1)


def region_means(features, scale):
    """(B, scale * scale, C): means over the regions of adaptive pooling, region by region."""
    h, w = features.shape[2:]
    means = [
        features[
            :,
            :,
            y * h // scale : math.ceil((y + 1) * h / scale),
            x * w // scale : math.ceil((x + 1) * w / scale),
        ].mean((2, 3))
        for y in range(scale)
        for x in range(scale)
    ]
    return torch.stack(means, 1)


# ---- the attentions ----------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", SIZES)
def test_criss_cross_attention_is_masked_full_attention(size, generator):
    module = randomised(CrissCrossAttention(16), generator)
    x = randn(generator, 2, 16, *size)
    pixels = as_rows(x)
    q, k, v = (project(p, pixels) for p in (module.query, module.key, module.value))
    y, column = (t.flatten() for t in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    on_cross = (y[:, None] == y) | (column[:, None] == column)
    assert on_cross.sum(1).eq(sum(size) - 1).all()
    scores = (q @ k.mT).masked_fill(~on_cross, -torch.inf)
    expected = x + module.gamma * as_map(scores.softmax(-1) @ v, x)
    assert_equal(module(x), expected)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", SIZES)
def test_position_attention_is_a_sum_over_all_pixels(size, generator):
    module = randomised(PositionAttention(12, 4), generator)
    x = randn(generator, 2, 12, *size)
    q, k, v = (project(p, as_rows(x)) for p in (module.query, module.key, module.value))
    expected = torch.empty_like(v)
    for b in range(2):
        for i in range(v.shape[1]):
            weights = torch.stack([(q[b, i] * k[b, j]).sum().exp() for j in range(v.shape[1])])
            expected[b, i] = (weights[:, None] * v[b]).sum(0) / weights.sum()
    assert_equal(module(x), x + module.gamma * as_map(expected, x))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", SIZES)
def test_channel_attention_favours_channels_that_differ(size, generator):
    module = randomised(ChannelAttention(), generator)
    x = randn(generator, 2, 6, *size)
    expected = torch.empty_like(x)
    for b in range(2):
        energy = torch.einsum("cyx,dyx->cd", x[b], x[b])
        for c in range(6):
            weights = (energy[c].max() - energy[c]).softmax(0)
            expected[b, c] = sum(weights[d] * x[b, d] for d in range(6))
    assert_equal(module(x), x + module.gamma * expected)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", SIZES)
def test_disentangled_non_local_is_whitened_pairs_plus_salience(size, generator):
    module = randomised(DisentangledNonLocal(16, temperature=0.3), generator)
    x = randn(generator, 2, 16, *size)
    expected = []
    for image in x:  # (C, h, w)
        pixels = image.flatten(1).T
        q, k, v = (project(p, pixels) for p in (module.query, module.key, module.value))
        pairwise = (q - q.mean(0)) @ (k - k.mean(0)).T / 8**0.5 / 0.3
        salience = project(module.salience, pixels)[:, 0].softmax(0)
        context = (pairwise.softmax(1) + salience) @ v  # each row's weights sum to two
        expected.append(context.T.unflatten(1, size))
    assert_equal(module(x), x + conv_bn(module.output, torch.stack(expected)))


def asymmetric(query, key, value, scales, width):
    """Attention of a map to the concatenated region means of two others."""
    keys, values = (torch.cat([region_means(t, s) for s in scales], 1) for t in (key, value))
    scores = torch.einsum("bnc,bsc->bns", as_rows(query), keys) / width**0.5
    return as_map(torch.einsum("bns,bsc->bnc", scores.softmax(-1), values), query)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", [(9, 11), (5, 7), (1, 6)])
def test_asymmetric_attention_pools_keys_and_values(size, generator):
    scales = (1, 3, 4)
    x, low = randn(generator, 2, 10, *size), randn(generator, 2, 7, 6, 5)
    module = randomised(AFNB(7, 10, transform_channels=4, pool_scales=scales), generator)
    value = as_map(project(module.value, as_rows(low)), low)
    context = asymmetric(conv_bn(module.query, x), conv_bn(module.key, low), value, scales, 4)
    context = as_map(project(module.output, as_rows(context)), x)
    assert_equal(module(x, low), conv_bn(module.fuse, torch.cat([context, x], 1)))

    module = randomised(APNB(10, transform_channels=4, pool_scales=scales), generator)
    query, value = conv_bn(module.query, x), as_map(project(module.value, as_rows(x)), x)
    context = as_map(project(module.output, as_rows(asymmetric(query, query, value, scales, 4))), x)
    assert_equal(module(x), conv_bn(module.fuse, torch.cat([context, x], 1)))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_adaptive_context_weighs_regions(size, scale, generator):
    module = randomised(AdaptiveContext(6, 8, scale), generator)
    features = randn(generator, 2, 6, *size)
    regions = region_means(features, scale).mT[..., None]  # (B, C, s*s, 1)
    regions = conv_bn(module.reduce_regions, regions)[..., 0]
    x = conv_bn(module.reduce, features)
    information = conv_bn(module.global_information, x.mean((2, 3), keepdim=True))
    affinity = 1 / (1 + (-project(module.affinity, as_rows(x + information))).exp())  # (B, N, s*s)
    context = torch.zeros_like(x)
    for s in range(scale**2):
        weight = as_map(affinity[..., s : s + 1], x)
        context += weight * regions[:, :, s, None, None]
    context = (x + conv_bn(module.residual, context)).clamp(min=0)
    assert_equal(module(features), conv_bn(module.fuse, context))


# ---- the whole contexts ------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pyramid_pooling_concatenates_resized_means(size, generator):
    module = randomised(PPM(6, 8, pool_scales=(1, 2, 3)), generator)
    x = randn(generator, 2, 6, *size)
    branches = [x]
    for scale, (_pool, *block) in zip((1, 2, 3), module.pyramid, strict=True):
        pooled = conv_bn(block, region_means(x, scale).mT.unflatten(2, (scale, scale)))
        branches.append(F.interpolate(pooled, size, mode="bilinear", align_corners=False))
    assert_equal(module(x), conv_bn(module.bottleneck, torch.cat(branches, 1)))


def test_atrous_pyramid_concatenates_dilations_and_the_mean(generator):
    module = randomised(ASPP(6, 8, dilations=(1, 2, 3)), generator)
    x = randn(generator, 2, 6, 5, 7)
    branches = [conv_bn(branch, x) for branch in module.branches]
    assert [branch[0].dilation for branch in module.branches] == [(1, 1), (2, 2), (3, 3)]
    mean = conv_bn(list(module.global_branch)[1:], x.mean((2, 3), keepdim=True))
    expected = conv_bn(module.bottleneck, torch.cat([*branches, mean.expand_as(branches[0])], 1))
    assert_equal(module(x), expected)


def test_published_order_of_the_parts(generator):
    x, low = randn(generator, 2, 6, 5, 7), randn(generator, 2, 5, 5, 7)
    cc = randomised(CCNet(6, 8, recurrence=3), generator)
    context = conv_bn(cc.before, x)
    for _ in range(3):
        context = cc.attention(context)
    fused = conv_bn(cc.fuse, torch.cat([x, conv_bn(cc.after, context)], 1))
    assert_equal(cc(x), fused)

    dnl = randomised(DNL(6, 8), generator)
    context = conv_bn(dnl.after, dnl.attention(conv_bn(dnl.before, x)))
    assert_equal(dnl(x), conv_bn(dnl.fuse, torch.cat([x, context], 1)))

    da = randomised(DANet(6, 8, transform_channels=4), generator)
    branches = [
        conv_bn(after, attention(conv_bn(before, x)))
        for before, attention, after in (da.position, da.channel)
    ]
    assert isinstance(da.position[1], PositionAttention)
    assert isinstance(da.channel[1], ChannelAttention)
    assert_equal(da(x), branches[0] + branches[1])

    ann = randomised(ANN(5, 6, 8, transform_channels=4), generator)
    assert_equal(ann(x, low), ann.context(conv_bn(ann.reduce, ann.fusion(x, low))))

    apc = randomised(APCNet(6, 8), generator)
    assert [context.pool_scale for context in apc.contexts] == [1, 2, 3, 6]
    parts = torch.cat([x, *(context(x) for context in apc.contexts)], 1)
    assert_equal(apc(x), conv_bn(apc.fuse, parts))


@pytest.mark.parametrize("name", [n for n in CONTEXTS if n != "EMANet"])  # it cuts gradients off
def test_gradients(name, generator):
    module = randomised(CONTEXTS[name](), generator)
    leaves = [t.requires_grad_() for t in inputs_of(module, generator, size=(3, 2), batch=1)]
    # The kinks of the ReLUs are further away than the step of the finite differences.
    assert torch.autograd.gradcheck(module, leaves, eps=1e-7, atol=1e-5)
    torch.autograd.backward(module(*leaves).sum())
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_expectation_maximisation(generator):
    """Pixel by pixel; the kept bases move by a tenth, and what is rebuilt has no gradient."""
    block = randomised(EMANet(6, 8, bases=3, iterations=2), generator).attention.train()
    block.output[1].eval()
    features = randn(generator, 2, 8, 2, 3).requires_grad_()
    start = block.bases.clone()
    out = block(features)
    rebuilt, found = torch.zeros(2, 8, 6).double(), []
    for image, pixels in enumerate(block.project(features).detach().flatten(2)):
        mu = start[0]
        for _ in range(2):
            z = torch.stack([(mu.T @ x).softmax(0) for x in pixels.T])
            sums = [sum(z[i, k] * pixels[:, i] for i in range(6)) / z[:, k].sum() for k in range(3)]
            mu = torch.stack([mean / mean.norm() for mean in sums], dim=1)
        found.append(mu)
        rebuilt[image] = mu @ z.T
    expected = features + block.output(rebuilt.view(2, 8, 2, 3).relu())
    assert_equal(out, expected.relu())
    mean = (found[0] + found[1]) / 2
    assert_equal(block.bases[0], 0.9 * start[0] + 0.1 * mean / mean.norm(dim=0))
    (gradient,) = torch.autograd.grad(out.sum(), features)
    assert_equal(gradient, (expected > 0).double())


@pytest.mark.parametrize("name", CONTEXTS)
def test_layouts_and_low_precision(name, generator):
    module = randomised(CONTEXTS[name](), generator)
    inputs = inputs_of(module, generator)
    with torch.no_grad():
        expected = module(*inputs)
        strided = [t.to(memory_format=torch.channels_last) for t in inputs]
        assert_equal(module(*strided), expected)
        assert_equal(module(*(t.mT.contiguous().mT for t in inputs)), expected)
        module = module.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = module(*(t.float() for t in inputs))
    assert low.isfinite().all()
    assert float((low - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_new_module_trains(name, generator):
    module = CONTEXTS[name]().train()
    out = module(*(t.float() for t in inputs_of(module, generator)))
    assert out.shape == (2, 8, 5, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    fixed = {"attention.project.weight", "attention.project.bias"}
    assert frozen == (fixed if name == "EMANet" else set())


@contextmanager
def calls():
    """Records the largest result of a call and the number of our attentions, one operator each."""
    seen = {"largest": 0, "attentions": 0}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace == "mcibi_fast":
                seen["attentions"] += 1
            if isinstance(out, torch.Tensor):
                seen["largest"] = max(seen["largest"], out.numel())
            return out

    with Recorder():
        yield seen


@pytest.mark.parametrize("name", CONTEXTS)
def test_no_map_of_all_pairs_of_pixels(name, generator):
    module = CONTEXTS[name]().eval()
    size = (24, 26)
    pixels = math.prod(size)
    with torch.no_grad(), calls() as seen:
        module(*(t.float() for t in inputs_of(module, generator, size=size, batch=1)))
    assert seen["largest"] <= pixels * sum(size) < pixels**2 / 8
    attentions = {"DANet": 1, "DNL": 1, "NonLocal": 1, "ANN": 2, "ISANet": 2}
    # That the attention itself forms no such map is tested with the op.
    assert seen["attentions"] == attentions.get(name, 0)
