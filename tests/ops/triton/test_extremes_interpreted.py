"""Numbers of any size on the Triton kernels, run by Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton")

from tests.ops import extremes
from tests.ops.table import Case

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("case", "numbers"), extremes.runs("class_rank_attention", "confidence_attention"), ids=str
)
@pytest.mark.thinned(always={"numbers": ["inf", "nan", "1e+30"]})
def test_numbers_of_any_size(
    case: Case, numbers: str, poison: None, products_in_order: None
) -> None:
    extremes.check(case, numbers, "triton")
