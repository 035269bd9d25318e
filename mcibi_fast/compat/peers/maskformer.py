"""MaskFormer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("decoder_predictor.", "decoder_mask.", "ppm_net.", "lateral_convs.")
_LAYERS = r"^predictor\.layers\.(\d+)\."
_RELEASED = r"decoder_predictor.transformer.decoder.layers.\1."
RENAMING = [
    *_blocks.POOLED,
    (r"^laterals\.", "lateral_convs."),
    (r"^outputs\.", "fpn_convs."),
    (r"^decoder\.", "decoder_mask.0."),
    (r"\.project_in\.", ".in_proj_"),
    (r"\.project_out\.", ".out_proj."),
    (rf"{_LAYERS}among\.", f"{_RELEASED}self_attn."),
    (rf"{_LAYERS}to_map\.", f"{_RELEASED}multihead_attn."),
    (rf"{_LAYERS}feed_forward\.0\.", f"{_RELEASED}linear1."),
    (rf"{_LAYERS}feed_forward\.3\.", f"{_RELEASED}linear2."),
    *((rf"{_LAYERS}norms\.{i}\.", f"{_RELEASED}norm{i + 1}.") for i in range(3)),
    (r"^predictor\.norm\.", "decoder_predictor.transformer.decoder.norm."),
    (r"^predictor\.project\.", "decoder_predictor.input_proj."),
    (r"^predictor\.queries\.", "decoder_predictor.query_embed."),
    (r"^predictor\.classes\.", "decoder_predictor.class_embed."),
    (r"^predictor\.masks\.", "decoder_predictor.mask_embed.layers."),
    (r"^class_weights$", "criterion.empty_weight"),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, queries and layers; not the number of attention heads."""
    prefix = "decoder_predictor.transformer.decoder.layers."
    queries, width = shape(state, "decoder_predictor.query_embed.weight", 2)
    layers = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
    return {
        "num_classes": shape(state, "decoder_predictor.class_embed.weight")[0] - 1,
        "feats_channels": shape(state, "ppm_net.bottleneck.0.weight")[0],
        "mask_channels": shape(state, "decoder_mask.0.weight")[0],
        "queries": queries,
        "transform_channels": width,
        "layers": len(layers),
        "hidden_channels": shape(state, f"{prefix}0.linear1.weight")[0],
    }
