"""Numbers of any size on the CPU's kernels."""

from __future__ import annotations

import pytest

from mcibi_fast import _build
from tests.ops import extremes
from tests.ops.table import Case

OPS = (
    "upsample_cross_entropy",
    "upsample_argmax",
    "upsample_confusion",
    "class_feature_sums",
    "memory_update",
    "gaussian_aggregate",
    "class_rank_attention",
)


@pytest.mark.skipif(_build.load_extensions()["cpu"] is not None, reason="needs the CPU's kernels")
@pytest.mark.parametrize(("case", "numbers"), extremes.runs(*OPS), ids=str)
def test_numbers_of_any_size(case: Case, numbers: str, poison: None) -> None:
    extremes.check(case, numbers, "cpu")
