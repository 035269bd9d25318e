"""The charts of a report draw what was recorded."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.reports.charts import png
from mcibi_fast.reports.curves import training_curves
from mcibi_fast.reports.memory import memory_chart, memory_over_time
from mcibi_fast.reports.scores import class_bars


def history(*losses: float) -> list[dict]:
    """Two terms, the second one a tenth of the loss, and an evaluation."""
    readings: list[dict] = [
        {"step": i + 1, "lr": 0.1 / (i + 1), "loss": x, "losses": {"loss_cls": 0.9 * x, "new": 0.1}}
        for i, x in enumerate(losses)
    ]
    return [*readings, {"step": len(losses), "metrics": {"mean_iou": 0.25}}]


def test_training_curves_draw_what_was_recorded() -> None:
    two = [{k: v for k, v in entry.items() if k != "losses"} for entry in history(5, 4)]
    figure = training_curves({"one": [history(3, 2), history(4, 1)], "two": [two]})
    scores, losses, rates, classifier, new = figure.axes
    assert [line.get_ydata().tolist() for line in losses.lines] == [[3, 2], [4, 1], [5, 4]]
    assert [line.get_ydata().tolist() for line in scores.lines] == [[25.0]] * 3
    assert [line.get_ydata().tolist() for line in rates.lines] == [[0.1, 0.05]] * 3
    # Only a model that has a term is in its panel.
    assert [line.get_ydata().tolist() for line in classifier.lines] == [
        pytest.approx([2.7, 1.8]),
        pytest.approx([3.6, 0.9]),
    ]
    assert new.get_title(loc="left") == "new" and len(new.lines) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_training_curves_leave_an_undefined_score_out() -> None:
    entries = [*history(1.0), {"step": 2, "metrics": {"mean_iou": None}}]
    (line,) = training_curves({"one": [entries]}).axes[0].lines
    assert line.get_xdata().tolist() == [1]


def test_memory_over_time_draws_the_lines_with_a_memory() -> None:
    entries: list[dict] = [
        {"step": 2, "loss": 1.0},
        {"step": 4, "epoch": 1, "memory": {"mean": [0.1, 0.2], "std": [1.0, 2.0]}},
        {"step": 8, "epoch": 2, "memory": {"mean": [0.3, 0.5], "std": [1.5, 2.5]}},
    ]
    palette = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    figure = memory_over_time(entries, ["a", "b"], palette)
    assert figure is not None
    means, deviations = figure.axes
    assert [line.get_xdata().tolist() for line in means.lines] == [[4, 8]] * 2
    assert [line.get_ydata().tolist() for line in means.lines] == [[0.1, 0.3], [0.2, 0.5]]
    assert [line.get_ydata().tolist() for line in deviations.lines] == [[1.0, 1.5], [2.0, 2.5]]
    assert [tuple(line.get_color()) for line in means.lines] == [(1, 0, 0), (0, 0, 1)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert memory_over_time(entries[:1], ["a", "b"], palette) is None


def test_class_bars_show_the_mean_over_runs() -> None:
    figure = class_bars(
        ["a", "b"], {"one": [[0.1, 0.5], [0.3, 0.7]], "two": [[0.4, float("nan")]] * 2}
    )
    lengths = [bar.get_width() for bar in figure.axes[0].patches]
    assert lengths[:3] == pytest.approx([20, 60, 40]) and np.isnan(lengths[3])
    # The number stands beside its bar; a class that does not occur has none.
    assert [text.get_text() for text in figure.axes[0].texts] == ["20.0", "60.0", "40.0"]


def test_memory_chart_spans_one_deviation_to_each_side() -> None:
    memory = np.array([[0.5, 0.25], [-1.0, 2.0]])
    figure = memory_chart(memory, ["a", "b"], np.zeros((2, 3), np.uint8))
    lines = [line.get_xdata() for line in figure.axes[0].lines]
    assert list(lines[0]) == [0.25, 0.75] and list(lines[1]) == [0.5]
    assert list(lines[2]) == [-3.0, 1.0]


def test_figures_become_png_files() -> None:
    figure = class_bars(["a"], {"one": [[0.5]]})
    image = Image.open(io.BytesIO(png(figure)))
    assert image.format == "PNG" and image.width > 500
