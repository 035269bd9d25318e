"""The poly schedule."""

from __future__ import annotations

import pytest

from mcibi_fast.training.schedule import poly_factor


def test_paper_form() -> None:
    assert poly_factor(0, 100) == 1.0
    assert poly_factor(50, 100) == pytest.approx(0.5**0.9, abs=1e-15)
    assert poly_factor(100, 100) == 0.0


def test_released_form_ends_at_one_percent() -> None:
    # The released code: (base - 0.01 base) * (1 - t / T) ** 0.9 + 0.01 base.
    for step in (0, 1, 37, 99, 100):
        expected = (1 - 0.01) * (1 - step / 100) ** 0.9 + 0.01
        assert poly_factor(step, 100, floor=0.01) == pytest.approx(expected, abs=1e-15)
    assert poly_factor(100, 100, floor=0.01) == 0.01
