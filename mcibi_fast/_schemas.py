"""The operators' schemas, written once for Python and for the C++ libraries.

The build reads this file without torch: from it ``buildtools/op_header.py`` writes the header with
which the bindings in ``csrc/`` define their operators. The ``DIGEST`` of the schemas that a library
was built with is recorded, so that a library built from older sources is recognised.
"""

from __future__ import annotations

import hashlib

# Arguments and results of torch.ops.mcibi_fast.<name>, in the dispatcher's notation.
SCHEMAS = {
    "class_feature_sums": (
        "(Tensor features, Tensor labels, int num_classes, int ignore_index, bool align_corners)"
        " -> (Tensor, Tensor)"
    ),
    "class_feature_sums_backward": (
        "(Tensor grad_sums, Tensor labels, SymInt height, SymInt width, int ignore_index, "
        "bool align_corners, ScalarType dtype) -> Tensor"
    ),
    "memory_update": (
        "(Tensor memory, Tensor features, Tensor labels, float momentum, bool unbiased, "
        "int ignore_index, bool align_corners) -> Tensor"
    ),
    "gaussian_table": "(Tensor memory, int channels, Tensor noise) -> Tensor",
    "gaussian_aggregate": (
        "(Tensor logits, Tensor memory, int channels, Tensor noise, bool hard) -> (Tensor, Tensor)"
    ),
    "gaussian_aggregate_backward": (
        "(Tensor grad, Tensor logits, Tensor lse, Tensor memory, Tensor noise) -> Tensor"
    ),
    "confidence_attention": (
        "(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor)"
    ),
    "confidence_attention_backward": (
        "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, float scale)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "class_rank_attention": (
        "(Tensor query, Tensor weights, float scale, bool hard) -> (Tensor, Tensor)"
    ),
    "class_rank_attention_backward": (
        "(Tensor grad, Tensor query, Tensor weights, Tensor out, Tensor lse, float scale)"
        " -> (Tensor, Tensor)"
    ),
    "upsample_cross_entropy": (
        "(Tensor logits, Tensor labels, Tensor? weight, int ignore_index, float label_smoothing, "
        "bool align_corners) -> (Tensor losses, Tensor lse)"
    ),
    "upsample_cross_entropy_backward": (
        "(Tensor grad_losses, Tensor logits, Tensor labels, Tensor lse, Tensor? weight, "
        "int ignore_index, float label_smoothing, bool align_corners) -> Tensor"
    ),
    "upsample_cross_entropy_reduced": (
        "(Tensor logits, Tensor labels, Tensor? weight, int ignore_index, float label_smoothing, "
        "bool align_corners, bool mean, bool with_grad) -> (Tensor loss, Tensor grad)"
    ),
    "upsample_cross_entropy_reduced_backward": (
        "(Tensor grad_loss, Tensor logits, Tensor labels, Tensor? weight, int ignore_index, "
        "float label_smoothing, bool align_corners, bool mean) -> Tensor"
    ),
    "upsample_cross_entropy_gather": (
        "(Tensor grad_loss, Tensor sums, Tensor logits, SymInt height, SymInt width) -> Tensor"
    ),
    "upsample_argmax": (
        "(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor"
    ),
    "upsample_confusion": (
        "(Tensor logits, Tensor labels, int ignore_index, bool align_corners) -> Tensor"
    ),
    "finite_rows": "(Tensor rows, Tensor seen) -> Tensor",
    "once": "(Tensor new, Tensor state) -> Tensor",
    "remembered": "(Tensor state, bool after_update) -> Tensor",
    "snapshot": "(Tensor state) -> Tensor",
}

# The ops for which each backend reports wrong labels, in one more tensor argument (see
# ops/labels.py). On CUDA an op's number is its position in this list; the backward of the cross
# entropy is not in it, because the forward has already counted the same labels.
OPS_WITH_LABELS = {
    "cpu": tuple(name for name, schema in SCHEMAS.items() if "Tensor labels" in schema),
    "cuda": (
        "class_feature_sums",
        "class_feature_sums_backward",
        "memory_update",
        "upsample_cross_entropy",
        "upsample_confusion",
        "upsample_cross_entropy_reduced",
    ),
}

# The ops that keep the rows of a memory which they would make infinite or NaN. Their kernels count
# these rows in one more tensor argument (see ops/finite.py).
OPS_THAT_KEEP_ROWS = ("memory_update",)


def compiled_schema(backend: str, name: str) -> str:
    """Name, arguments and results of torch.ops.mcibi_fast_<backend>.<name>."""
    schema = name + SCHEMAS[name].replace("SymInt", "int")
    if name in OPS_WITH_LABELS[backend]:
        schema = schema.replace(") -> ", ", Tensor(a!) bad_labels) -> ")
    if name in OPS_THAT_KEEP_ROWS:
        schema = schema.replace(") -> ", ", Tensor(b!) kept_rows) -> ")
    return schema


DIGEST = hashlib.sha256(repr((SCHEMAS, OPS_WITH_LABELS, OPS_THAT_KEEP_ROWS)).encode()).hexdigest()[
    :16
]
