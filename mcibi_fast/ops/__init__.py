"""The fused operators: public functions on tensors, differentiable and traceable."""

from mcibi_fast.ops.class_rank_attention import class_rank_attention
from mcibi_fast.ops.confidence_attention import confidence_attention
from mcibi_fast.ops.dispatch import BackendError, decompositions
from mcibi_fast.ops.finite import kept_rows
from mcibi_fast.ops.gaussian_aggregate import gaussian_aggregate, gaussian_table
from mcibi_fast.ops.labels import check_labels
from mcibi_fast.ops.memory_update import class_feature_sums, memory_update
from mcibi_fast.ops.philox import Philox
from mcibi_fast.ops.scripting import refuse_scripting
from mcibi_fast.ops.upsample_argmax import upsample_argmax, upsample_confusion
from mcibi_fast.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "BackendError",
    "Philox",
    "check_labels",
    "class_feature_sums",
    "class_rank_attention",
    "confidence_attention",
    "decompositions",
    "gaussian_aggregate",
    "gaussian_table",
    "kept_rows",
    "memory_update",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
]

refuse_scripting(*(globals()[name] for name in __all__ if name not in ("BackendError", "Philox")))
