"""MCIBI's state dict against the entries of the released code's."""

from __future__ import annotations

import re

import pytest

from mcibi_fast import models

K, Z = 5, 16
TINY = {"backbone": "test_resnet", "feats_channels": Z, "transform_channels": 8}

RENAMING = [
    (r"^context\.memory\.", "memory_module."),
    (r"^context\.attention\.parts\.", "memory_module.self_attentions."),
    (r"^context\.attention\.join\.", "memory_module.fuse_memory_conv."),
    (r"^context\.attention\.", "memory_module.self_attention."),
    (r"^context_attention\.", "memory_module.self_attention_ms."),
    (r"\.(query|key|value)\.", r".\1_project."),
    (r"\.output\.", ".out_project."),
    (r"^context\.fuse\.conv\.", "memory_module.bottleneck."),
    (r"^context_fuse\.", "memory_module.bottleneck_ms."),
    (r"^context\.weight_head\.", "decoder_stage1."),
    (r"^decoder\.", "decoder_stage2."),
    (r"^auxiliary\.", "auxiliary_decoder."),
    (r"^(\w+decoder|decoder_\w+)\.conv\.", r"\1."),
    (r"^(\w+decoder|decoder_\w+)\.classifier\.", r"\1.4."),
]


def attention_shapes(prefix):
    T = TINY["transform_channels"]
    return {
        f"{prefix}.{name}.weight": (*shape, 1, 1)
        for name, shape in {
            "query_project.0.0": (T, Z),
            "query_project.1.0": (T, T),
            "key_project.0.0": (T, Z),
            "key_project.1.0": (T, T),
            "value_project.0": (T, Z),
            "out_project.0": (Z, T),
        }.items()
    }


@pytest.mark.parametrize("n", [1, 3])
def test_entries_are_those_of_the_released_layout(n):
    """Convolutions and memory under the released names (batch norms follow each convolution)."""
    model = models.create("deeplabv3_mcibi", K, **TINY, dilations=(1, 2), representations=n)
    found = {}
    for name, value in model.head.state_dict().items():
        for pattern, replacement in RENAMING:
            name = re.sub(pattern, replacement, name)
        if (value.ndim == 4 or "memory" in name or name.endswith("4.bias")) and not re.search(
            r"^within_image|running|tracked|\.1\.(weight|bias)$|_project.*bias", name
        ):
            found[name] = tuple(value.shape)
    last, previous = model.backbone.channels[-1], model.backbone.channels[-2]
    expected = {
        "bottleneck.0.weight": (Z, last, 3, 3),
        "memory_module.memory": (K, n, Z),
        "memory_module.bottleneck.0.weight": (Z, 2 * Z, 3, 3),
        "memory_module.bottleneck_ms.0.weight": (Z, 2 * Z, 3, 3),
        "decoder_stage1.0.weight": (Z, Z, 1, 1),
        "decoder_stage1.4.weight": (K, Z, 1, 1),
        "decoder_stage1.4.bias": (K,),
        "decoder_stage2.0.weight": (Z, Z, 1, 1),
        "decoder_stage2.4.weight": (K, Z, 1, 1),
        "decoder_stage2.4.bias": (K,),
        "auxiliary_decoder.0.weight": (Z, previous, 3, 3),
        "auxiliary_decoder.4.weight": (K, Z, 1, 1),
        "auxiliary_decoder.4.bias": (K,),
        **attention_shapes("memory_module.self_attention_ms"),
    }
    if n == 1:
        expected |= attention_shapes("memory_module.self_attention")
    else:
        expected["memory_module.fuse_memory_conv.0.weight"] = (Z, n * Z, 1, 1)
        for i in range(n):
            expected |= attention_shapes(f"memory_module.self_attentions.{i}")
    assert found == expected
