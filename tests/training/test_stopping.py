"""Early stopping: patience on a metric."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mcibi_fast.recipes import StoppingConfig, TrainConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train


def over(values: list[float | None], **settings) -> list[bool]:
    """After each evaluation."""
    stopping = StoppingConfig(**settings)
    scores = [{"mean_iou": value, "pixel_accuracy": 0.5} for value in values]
    return [stopping.is_over(scores[: i + 1]) for i in range(len(scores))]


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0.1, 0.1, 0.1], {}, [False, False, False]),
        ([0.1, 0.1, 0.1], {"patience": 2}, [False, False, True]),
        ([0.1, 0.0, 0.2, 0.1, 0.1], {"patience": 2}, [False, False, False, False, True]),
        ([0.1, 0.15, 0.19], {"patience": 2, "min_delta": 0.1}, [False, False, True]),
        ([0.1, 0.15, 0.21], {"patience": 2, "min_delta": 0.1}, [False, False, False]),
        ([0.1, None, 0.2], {"patience": 2}, [False, False, False]),
        ([0.1, 0.2, 0.3], {"patience": 1, "metric": "pixel_accuracy"}, [False, True, True]),
    ],
)
def test_patience(values: list, settings: dict, expected: list[bool]) -> None:
    assert over(values, **settings) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stopping.patience=0", "stopping.patience: expected at least 1, got 0"),
        ("stopping.min_delta=-1", "stopping.min_delta: expected 0 or more"),
        ("stopping.metric=miou", "no metric 'miou'; did you mean mean_iou?"),
    ],
)
def test_errors(tiny_config: Callable[..., TrainConfig], setting: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny_config(setting).validate()
    assert message in str(caught.value)


def test_a_metric_of_two_classes(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = tiny_config("stopping.patience=1", "stopping.metric=foreground_dice")
    with pytest.raises(ValueError, match="foreground_dice is for two classes; the data have"):
        train(config, tmp_path / "run", progress=False, report=str)


@pytest.mark.slow
def test_a_run_stops_and_is_over_when_resumed(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Nothing improves by more than 1; the learning rate is that of all epochs."""
    config = tiny_config("epochs=5", "stopping.patience=2", "stopping.min_delta=1.0")
    lines: list[str] = []
    seed_global_generators(7)
    result = train(config, tmp_path / "run", progress=False, report=lines.append)
    assert result.steps == 9  # of 15: the first evaluation and two more
    assert lines[-1] == "stopped after epoch 3: mean_iou has not improved in 2 evaluations"
    rates = [e["lr"] for e in Run(result.out).history() if "lr" in e]
    seed_global_generators(7)
    whole = train(tiny_config("epochs=5"), tmp_path / "whole", progress=False, report=str)
    expected = [e["lr"] for e in Run(whole.out).history() if "lr" in e]
    assert rates == expected[: len(rates)] and len(rates) < len(expected)
    settings = Run(result.out).settings()
    again = train(settings, result.out, resume=True, progress=False, report=str)
    assert (again.steps, again.metrics, again.best) == (9, result.metrics, result.best)
