"""The sweep compares before it measures, and says which cases are slower."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import sweep, sweep_cases
from benchmarks.cases import Case, Disagreement
from benchmarks.sweep_cases import BOTH, CHANNELS_LAST, CONTIGUOUS, FORWARD, case

FORMS = {
    "argmax": lambda cast: sweep_cases.argmax(3, 2, 4, cast),
    "confusion": lambda cast: sweep_cases.confusion(3, 2, 4, cast),
    "cross_entropy": lambda cast: sweep_cases.cross_entropy(3, 2, 4, cast, weighted=True),
    "class_sums": lambda cast: sweep_cases.class_sums(3, 2, 4, cast, Z=5),
    "class_rank": lambda cast: sweep_cases.class_rank(3, 4, cast),
    "confidence": lambda cast: sweep_cases.confidence(3, 4, cast, maps=True),
    "aggregate": lambda cast: sweep_cases.aggregate(3, 2, 5, cast),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_op_agrees_with_pytorch(name: str) -> None:
    backward = name not in ("argmax", "confusion")
    for dtype, layout in ((torch.float32, CONTIGUOUS), (torch.bfloat16, CHANNELS_LAST)):
        if layout == CHANNELS_LAST and name in ("class_rank", "confidence"):
            layout = CONTIGUOUS  # rows have no other layout
        for direction in (FORWARD, BOTH) if backward else (FORWARD,):
            made = case(FORMS[name], dtype, layout, direction)
            assert made is not None
            sweep.check(made)


def small() -> Case:
    made = case(FORMS["class_sums"], torch.float32, CONTIGUOUS, FORWARD)
    assert made is not None
    return made


def test_a_wrong_result_is_not_timed() -> None:
    made = small()
    wrong = dataclasses.replace(made.candidates[-1], run=lambda: (torch.zeros(3, 5), torch.ones(3)))
    with pytest.raises(Disagreement, match="the error of ours is"):
        sweep.check(dataclasses.replace(made, candidates=[*made.candidates[:-1], wrong]))


def test_rows_and_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "fastest", lambda runs, seconds: [100.0, 106.0])
    slow = sweep.row_of(small(), 0.0)
    assert slow["ratio"] == pytest.approx(1.06) and slow["slower"]
    monkeypatch.setattr(sweep, "fastest", lambda runs, seconds: [10.0, 19.0])
    tiny = sweep.row_of(small(), 0.0)
    assert tiny["ratio"] == pytest.approx(1.9) and not tiny["slower"]  # below twice PyTorch's
    (line,) = sweep.summary([slow, tiny])
    assert (line["cases"], line["slower"], line["slower %"]) == (2, 1, 50)
    assert line["worst"] == slow["ratio"] and line["worst tiny"] == tiny["ratio"]


def test_an_interrupted_sweep_continues(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = [
        case(FORMS[name], torch.float32, CONTIGUOUS, FORWARD) for name in ("argmax", "confusion")
    ]
    monkeypatch.setattr(sweep, "fastest", lambda runs, seconds: [100.0] * len(runs))
    monkeypatch.setattr(sweep, "keep_freed_memory", lambda: None)

    def grid(count: int) -> None:
        cases = [(c.op, lambda c=c: c) for c in made[:count] if c is not None]
        monkeypatch.setattr(sweep, "cases", lambda quick: iter(cases))

    grid(1)
    sweep.write_report(sweep.run(tmp_path), tmp_path)
    grid(2)
    measured: list[str] = []
    monkeypatch.setattr(sweep, "check", lambda case: measured.append(case.op))
    result = sweep.run(tmp_path, resume=True)
    assert measured == ["upsample_confusion"] and len(result["rows"]) == 2
    assert len(sweep.run(tmp_path)["rows"]) == 2 and len(measured) == 3  # all again


def test_the_quick_grid_has_every_op() -> None:
    assert {name for name, _ in sweep_cases.cases(quick=True)} == set(FORMS)
