"""The report and its charts."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.viz.curves import class_bars, memory_chart, png, training_curves
from mcibi_fast.viz.report import Report


def test_page_is_whole_and_needs_nothing_from_outside() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    report = Report("A & B <i>")
    report.heading("Part <1>")
    report.text("less < more")
    report.table(["model", "mIoU"], [["FCN", "1.5"], ["<b>", "2"]])
    report.picture(picture, 'a "caption"')
    page = report.html()
    assert "<title>A &amp; B &lt;i&gt;</title>" in page and "Part &lt;1&gt;" in page
    assert "<td>&lt;b&gt;</td>" in page and "less &lt; more" in page
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!data:)", page)
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)" alt="a &quot;caption&quot;"', page)
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.array(embedded), np.array(picture))


def history(*losses: float) -> list[dict]:
    readings: list[dict] = [{"step": i + 1, "loss": x} for i, x in enumerate(losses)]
    return [*readings, {"step": len(losses), "metrics": {"mean_iou": 0.25}}]


def test_training_curves_draw_what_was_recorded() -> None:
    figure = training_curves({"one": [history(3, 2), history(4, 1)], "two": [history(5, 4)]})
    losses, scores = figure.axes
    assert [line.get_ydata().tolist() for line in losses.lines] == [[3, 2], [4, 1], [5, 4]]
    assert [line.get_ydata().tolist() for line in scores.lines] == [[25.0]] * 3
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["one", "two"]


def test_class_bars_show_the_mean_over_runs() -> None:
    figure = class_bars(
        ["a", "b"], {"one": [[0.1, 0.5], [0.3, 0.7]], "two": [[0.4, float("nan")]] * 2}
    )
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[:3] == pytest.approx([20, 60, 40]) and np.isnan(heights[3])


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
