"""The names in the released checkpoints, from this package's names."""

from __future__ import annotations

import re

from mcibi_fast.compat.zoo import Method

Rules = list[tuple[str, str]]  # regular expressions and replacements, applied in this order

_WITHIN_IMAGE: Rules = [
    (r"^within_image\.branches\.", "context_within_image_module.parallel_branches."),
    (r"^within_image\.pyramid\.", "context_within_image_module.branches."),
    (r"^within_image\.", "context_within_image_module."),
]

_CONTEXT: Rules = [
    (r"^context\.memory\.", "memory_module."),
    (r"^context\.attention\.parts\.(\d+)\.", r"memory_module.self_attentions.\1."),
    (r"^context\.attention\.join\.", "memory_module.fuse_memory_conv."),
    (r"^context\.attention\.", "memory_module.self_attention."),
    (r"^context\.downsample\.", "memory_module.downsample_before_sa."),
    (r"^context\.fuse\.conv\.", "memory_module.bottleneck."),
]

_ATTENTION: Rules = [
    (rf"(attention\w*(?:\.\d+)?|correlate_net)\.{own}\.", rf"\1.{released}_project.")
    for own, released in (("query", "query"), ("key", "key"), ("value", "value"), ("output", "out"))
]

AUXILIARY: Rules = [
    (r"^auxiliary\.conv\.", "auxiliary_decoder."),
    (r"^auxiliary\.classifier\.", "auxiliary_decoder.4."),
    (r"^auxiliary\.(\d+)\.blocks\.0\.(\d)\.", r"auxiliary_decoder.\1.\2."),
    (r"^auxiliary\.(\d+)\.blocks\.1\.0\.", r"auxiliary_decoder.\1.4."),
    (r"^auxiliary\.(\d+)\.blocks\.1\.1\.", r"auxiliary_decoder.\1.5."),
    (r"^auxiliary\.(\d+)\.classifier\.", r"auxiliary_decoder.\1.9."),
]

# MCIBI's and ISNet's classifiers are plain sequences; ISNet's second may have no convolution block.
_STAGES: Rules = [
    (r"^(decoder_stage\d)\.conv\.", r"\1."),
    (r"^(decoder_stage\d)\.classifier\.", r"\1.4."),
]

_MCIBIPP: Rules = [
    *_CONTEXT,
    (r"^context\.weight_head\.", "decoder_pr."),
    (r"^within_image_head\.", "decoder_cwi."),
    *_WITHIN_IMAGE,
    (r"^extra_attention\.", "self_attention."),
    (r"^pyramid\.laterals\.", "lateral_convs."),
    (r"^pyramid\.outputs\.", "fpn_convs."),
    (r"^decoder\.", "decoder_cls."),
    (r"^(decoder_\w+)\.conv\.0\.", r"\1.conv1."),
    (r"^(decoder_\w+)\.conv\.1\.", r"\1.bn1."),
    (r"^(decoder_\w+)\.classifier\.", r"\1.conv2."),
]

_MCIBI: Rules = [
    *_CONTEXT,
    (r"^context\.weight_head\.", "decoder_stage1."),
    *_WITHIN_IMAGE,
    (r"^context_attention\.", "memory_module.self_attention_ms."),
    (r"^context_fuse\.", "memory_module.bottleneck_ms."),
    (r"^decoder\.", "decoder_stage2."),
    *_STAGES,
]

_ISNET: Rules = [
    (r"^within_image\.image_level\.", "ilc_net."),
    (r"^within_image\.semantic_level\.", "slc_net."),
    (r"^(ilc_net|slc_net)\.attention\.", r"\1.correlate_net."),
    (r"^(ilc_net|slc_net)\.fuse\.", r"\1.bottleneck."),
    (r"^first_decoder\.", "decoder_stage1."),
    (r"^decoder\.", "decoder_stage2."),
    *_STAGES,
]

_RULES: dict[Method, Rules] = {"mcibiplusplus": _MCIBIPP, "mcibi": _MCIBI, "isnet": _ISNET}


def released_name(name: str, method: Method = "mcibiplusplus", *, shortcut: bool = True) -> str:
    """Translates a name in the state dict of a head or model (``head.``) to the checkpoint's name.

    For names of a backbone see :func:`mcibi_fast.models.released_backbones.released_name`.

    Args:
        name: the name; those of a backbone are returned as they are.
        method: whose head it is.
        shortcut: of ISNet: whether it has the shortcut, and with it a longer last classifier.
    """
    name = name.removeprefix("head.")
    for pattern, replacement in (*_RULES[method], *_ATTENTION, *AUXILIARY):
        name = re.sub(pattern, replacement, name)
    if method == "isnet" and not shortcut:
        name = re.sub(r"^decoder_stage2\.4\.", "decoder_stage2.1.", name)
    return name
