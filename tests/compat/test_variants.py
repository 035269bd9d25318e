"""What the package can build and the model zoo does not have, beside the package itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mcibi_fast.compat import sssegmentation
from tests.compat import zoo_models as zoo

pytestmark = pytest.mark.slow

Config = dict[str, Any]
PLAIN = "mcibiplusplus_resnet50os8_ade20k"
UPERNET = "mcibiplusplus_upernet_resnet50os8_voc"
ASPP = "mcibiplusplus_aspp_resnet50os8_lip"
MCIBI = "mcibi_deeplabv3_r50_ade20k"


def hard(config: Config) -> Config:
    config["head"]["use_hard_aggregate"] = True
    return {"hard": True}


def memory_after_the_pyramid(config: Config) -> Config:
    head, Z = config["head"], zoo.SMALL_WIDTH
    head["fuse_memory_cwi_before_fpn"] = False
    head["fpn"] |= {"feats_channels": Z, "out_channels": 24}
    head["decoder"]["cls"]["in_channels"] = 3 * 24 + 2 * Z
    return {}


def odd_pyramid(config: Config) -> Config:
    head = config["head"]
    head["fpn"]["out_channels"] = 10
    head["decoder"]["cls"]["in_channels"] = 3 * 10 + 2 * zoo.SMALL_WIDTH
    return {}


def other_dilations(config: Config) -> Config:
    config["head"]["context_within_image"]["cfg"]["dilations"] = [1, 2, 3]
    return {"dilations": (1, 2, 3)}


def leaky(config: Config) -> Config:
    config["act_cfg"] = {"type": "LeakyReLU", "negative_slope": 0.2, "inplace": True}
    return {"negative_slope": 0.2}


def basic_blocks(config: Config) -> Config:
    config["backbone"] |= {"depth": 18, "base_channels": 16}
    return {}


def stride_16(config: Config) -> Config:
    config["backbone"]["outstride"] = 16
    return {"output_stride": 16}


def several_representations(config: Config) -> Config:
    config["head"]["num_feats_per_cls"] = 3
    return {}


def without_context(config: Config) -> Config:
    config["head"]["context_within_image"]["is_on"] = False
    return {}


def pyramid_pooling(config: Config) -> Config:
    context = config["head"]["context_within_image"]
    context |= {"type": "ppm", "cfg": {"pool_scales": [1, 4]}}
    return {"pool_scales": (1, 4)}


def aligned_corners(config: Config) -> Config:
    config["align_corners"] = True
    return {"align_corners": True}


VARIANTS: list[tuple[str, Callable[[Config], Config]]] = [
    (PLAIN, hard),
    (PLAIN, basic_blocks),
    (UPERNET, memory_after_the_pyramid),
    (UPERNET, odd_pyramid),
    (UPERNET, aligned_corners),
    (ASPP, other_dilations),
    (ASPP, leaky),
    (ASPP, stride_16),
    (MCIBI, several_representations),
    (MCIBI, without_context),
    (MCIBI, pyramid_pooling),
]


@pytest.mark.parametrize(("name", "vary"), VARIANTS, ids=lambda part: getattr(part, "__name__", ""))
def test_variants(name: str, vary: Callable[[Config], Config], generator: torch.Generator) -> None:
    config = zoo.settings(zoo.PUBLISHED[name], small=True)
    options = vary(config)
    released = zoo.scramble(zoo.build(config).eval(), generator).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is assumed
        loaded = sssegmentation.load(zoo.checkpoint(released), **options).double()
    images = torch.randn(1, 3, 49, 75, generator=generator, dtype=torch.float64)
    expected = zoo.logits(released, images)
    with torch.no_grad():
        logits = loaded(images).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
