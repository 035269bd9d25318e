"""The parts of further contexts and decoders, each against its definition, written out by loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mcibi_fast.models.ce2p import edge_targets
from mcibi_fast.models.encnet import present_classes
from mcibi_fast.nn.points import RandomPoints, cell_centres, sample_points, uncertainty
from mcibi_fast.nn.within_image import ISANet, ObjectContext
from mcibi_fast.nn.within_image.dmnet import DynamicContext
from mcibi_fast.nn.within_image.encnet import Encoding
from mcibi_fast.nn.within_image.psanet import relative_scores
from tests.nn.test_within_image import (
    SIZES,
    as_rows,
    assert_equal,
    conv_bn,
    project,
    randn,
    randomised,
    region_means,
)


@pytest.mark.parametrize("window", [(3, 5), (1, 1), (13, 13)])
@pytest.mark.parametrize("size", SIZES)
def test_scores_of_pairs_are_those_of_their_offsets(size, window, generator):
    x = randn(generator, 2, 4, *size)
    conv = nn.Conv2d(4, window[0] * window[1], 1, bias=False).double()
    predicted = conv(x)
    (h, w), (rows, columns) = size, window
    expected = torch.zeros(2, h, w, h, w, dtype=torch.float64)
    for y in range(h):
        for left in range(w):
            for other_y in range(h):
                for other_x in range(w):
                    i, j = other_y - y + rows // 2, other_x - left + columns // 2
                    if 0 <= i < rows and 0 <= j < columns:
                        expected[:, y, left, other_y, other_x] = predicted[
                            :, i * columns + j, y, left
                        ]
    found = relative_scores(x, conv, window)
    torch.testing.assert_close(found, expected.flatten(3).flatten(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("filter_size", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_dynamic_context_filters_with_predicted_kernels(size, filter_size, generator):
    module = randomised(DynamicContext(6, 8, filter_size), generator)
    features = randn(generator, 2, 6, *size)
    kernels = project(module.kernels, region_means(features, filter_size)).mT  # (B, C, k*k)
    x = conv_bn(module.reduce, features)
    before = filter_size // 2
    padded = F.pad(x, (before, before, before, before))
    out = torch.zeros_like(x)
    for i in range(filter_size):
        for j in range(filter_size):
            moved = padded[:, :, i : i + size[0], j : j + size[1]]
            out += kernels[:, :, i * filter_size + j, None, None] * moved
    norm = module.norm
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    out = (out - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None]
    assert_equal(module(features), (out + norm.bias[:, None, None]).clamp(min=0))


def test_encoding_sums_weighted_residuals(generator):
    module = randomised(Encoding(5, 3), generator)
    x = randn(generator, 2, 5, 4, 6)
    residuals = as_rows(x)[:, :, None] - module.codewords  # (B, N, codes, C)
    weights = (module.scale * residuals.square().sum(3)).softmax(2)
    assert_equal(module(x), (weights[..., None] * residuals).sum(1))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_interlaced_attention_is_attention_in_groups(size, generator):
    """First among equal positions of the blocks, then within each block; zeros pad the map."""
    module = randomised(ISANet(6, 8, transform_channels=4, block_size=(2, 3)), generator)
    features = randn(generator, 2, 6, *size)
    x = conv_bn(module.before, features)
    height, width = (-(-side // block) * block for side, block in zip(size, (2, 3), strict=True))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    padded = torch.zeros(2, 8, height, width, dtype=torch.float64)
    padded[:, :, top : top + size[0], left : left + size[1]] = x
    far, near = torch.zeros_like(padded), torch.zeros_like(padded)
    for i in range(2):
        for j in range(3):
            far[:, :, i::2, j::3] = module.far(padded[:, :, i::2, j::3])
    for i in range(0, height, 2):
        for j in range(0, width, 3):
            block = far[:, :, i : i + 2, j : j + 3]
            near[:, :, i : i + 2, j : j + 3] = module.near(block)
    context = near[:, :, top : top + size[0], left : left + size[1]]
    assert_equal(module(features), conv_bn(module.fuse, torch.cat([context, x], 1)))


def test_object_regions_are_weighted_means(generator):
    module = randomised(ObjectContext(8, 4), generator)
    R, coarse = randn(generator, 2, 8, 4, 6), randn(generator, 2, 3, 4, 6)
    weights = as_rows(coarse).softmax(1)  # (B, N, K)
    regions = torch.einsum("bnk,bnc->bck", weights, as_rows(R))
    context = module.attention(R, regions[..., None])
    assert_equal(module(R, coarse), conv_bn(module.fuse, torch.cat([context, R], 1)))


def test_edges_are_near_changes_of_the_class():
    labels = torch.zeros(1, 7, 9, dtype=torch.uint8)
    labels[:, :, 5:] = 1
    labels[:, 0, 0] = 255
    edges = edge_targets(labels, 255)
    # The changes mark column 4 (left, and upper left) and column 5 (upper right); the last row has
    # only the former, but its neighbours above reach it.
    expected = torch.zeros(1, 7, 9, dtype=torch.long)
    expected[:, :, 3:7] = 1
    expected[:, 0, 0] = 255
    assert torch.equal(edges, expected)
    assert not edge_targets(torch.full((1, 4, 4), 3), 255).any()
    ignored = torch.tensor([[[0, 255, 1]]])
    assert edge_targets(ignored, 255).tolist() == [[[0, 255, 0]]]


def test_classes_that_are_present():
    labels = torch.tensor([[[0, 2], [2, 255]], [[1, 1], [1, -100]]])
    assert present_classes(labels, 3).tolist() == [[True, False, True], [False, True, False]]


def test_random_points_depend_on_seed_and_step_alone():
    before = torch.get_rng_state()
    points, twin = RandomPoints(3).train(), RandomPoints(3).train()
    first, second = (points(4, 500, torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (4, 500, 2) and first.dtype == torch.float32
    assert torch.equal(twin(4, 500, torch.device("cpu")), first)
    assert not torch.equal(first, second)
    assert not torch.equal(RandomPoints(4)(4, 500, torch.device("cpu")), first)
    twin.eval()
    assert torch.equal(twin(4, 500, torch.device("cpu")), twin(4, 500, torch.device("cpu")))
    both = torch.cat([first, second]).flatten()
    assert both.min() >= 0 and both.max() < 1
    counts = both.mul(10).long().bincount(minlength=10)
    assert ((counts - 800).abs() < 5 * 720**0.5).all()  # 5 standard deviations
    assert abs(float(torch.corrcoef(first.view(-1, 2).T)[0, 1])) < 0.1


def test_points_at_the_cells_centres_are_the_cells(generator):
    logits = randn(generator, 2, 3, 5, 7)
    cells = torch.arange(35).expand(2, -1)
    found = sample_points(logits, cell_centres(cells, logits.shape[2:]))
    torch.testing.assert_close(found, logits.flatten(2), rtol=1e-5, atol=1e-5)
    low = sample_points(logits.bfloat16(), cell_centres(cells, logits.shape[2:]))
    assert low.dtype == torch.bfloat16  # but the points were not rounded to 8 bits
    torch.testing.assert_close(low.double(), logits.flatten(2), rtol=0.02, atol=0.02)
    best = logits.sort(1, descending=True).values
    assert torch.equal(uncertainty(logits), best[:, 1] - best[:, 0])
