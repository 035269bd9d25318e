"""Reports of a stranger's run: bounded in size and time, and names are drawn letter by letter."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from mcibi_fast.reports.charts import CHART_CLASSES, POINTS, drawable, plain, png
from mcibi_fast.reports.curves import LOSS_TERMS, training_curves
from mcibi_fast.reports.features import Space, embedding_chart
from mcibi_fast.reports.memory import memory_chart, memory_over_time
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.predictions import prediction_sheet
from mcibi_fast.reports.scores import class_bars
from mcibi_fast.reports.sheets import Scene
from mcibi_fast.reports.weight_maps import class_weight_sheet
from mcibi_fast.training.run import Run
from tests.security.entries import RUN_ENTRIES

pytestmark = pytest.mark.usefixtures("one_process")
# Each is an error, or another text, to who takes it for mathematics; and what moves the pen.
MATHS = [
    r"$\frac{1}$",
    "$x^$",
    r"$\undefined$",
    "$" + "{" * 50 + "$",
    r"costs \$5 and $6",
    "$$",
    "a\nb\x1b[2J\u202e",
    "x" * 100_000,
]
GREY = np.full((len(MATHS), 3), 128, np.uint8)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def assert_drawn_plainly(figure: Figure) -> None:
    assert png(figure)
    for text in texts(figure):
        assert is_math_text(text.replace(r"$\mathdefault", "")) is False or "mathdefault" in text
        assert all(c.isprintable() or c == "\n" for c in text) and len(text) < 400


def test_names_are_not_mathematics() -> None:
    assert plain("$x$") == r"\$x\$" and not is_math_text(plain(r"\$x$"))
    ious = {name: [[0.5] * len(MATHS)] for name in MATHS[:3]}
    assert_drawn_plainly(class_bars(MATHS, ious))
    memory = np.ones((len(MATHS), 2))
    assert_drawn_plainly(memory_chart(memory, MATHS, GREY))
    lines = [
        {"step": s, "epoch": s, "memory": {"mean": [0.0] * len(MATHS), "std": [1.0] * len(MATHS)}}
        for s in range(3)
    ]
    chart = memory_over_time(lines, MATHS, GREY)
    assert chart is not None
    assert_drawn_plainly(chart)
    history = [{"step": s, "loss": 1.0, "losses": dict.fromkeys(MATHS, 1.0)} for s in range(3)]
    assert_drawn_plainly(training_curves({name: [history] for name in MATHS}))
    vectors = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    spaces = [Space(f"{name}\nR", np.arange(12) % len(MATHS), vectors) for name in MATHS[:2]]
    assert_drawn_plainly(embedding_chart(spaces, MATHS, GREY))


def test_names_in_sheets_are_short() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    label = np.arange(64).reshape(8, 8) % len(MATHS)
    scene = Scene("x" * 100_000, pixels, label)
    sheet = prediction_sheet([scene], {"FCN": [label]}, MATHS, GREY)
    weights = {name: np.ones((8, 8)) for name in MATHS}
    for picture in (sheet, class_weight_sheet(scene, weights, GREY)):
        assert max(picture.size) < 4000


def test_markup_in_names_is_text() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    report = Report(hostile)
    report.heading(hostile)
    report.text(hostile)
    report.code(hostile)
    report.table([hostile], [[hostile]], fold=hostile)
    report.legend([hostile], [[1, 2, 3]])
    report.picture(Image.new("L", (1, 1)), hostile)
    page = report.html()
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)") == 11


def image_of(figure: Figure) -> Image.Image:
    return Image.open(io.BytesIO(png(figure)))


def test_charts_of_many_classes_are_of_a_bounded_size() -> None:
    for count in (CHART_CLASSES, 100_000):
        names = [f"class {k}" for k in range(count)]
        palette = np.zeros((count, 3), np.uint8)
        for figure in (
            class_bars(names, {"FCN": [[0.5] * count]}),
            memory_chart(np.ones((count, 2)), names, palette),
        ):
            size = image_of(figure).size
            assert max(size) < 140 * 100, size
    lines = [{"step": 1, "memory": {"mean": [0.0] * count, "std": [1.0] * count}}]
    chart = memory_over_time(lines, names, palette)
    assert chart is not None and len(chart.axes[0].lines) == CHART_CLASSES


def test_curves_of_many_terms_and_readings() -> None:
    history = [
        {"step": s, "loss": 1.0, "losses": {f"loss_{i}": 1.0 for i in range(600)}} for s in (1, 2)
    ]
    figure = training_curves({"FCN": [history]})
    assert len(figure.axes) == 3 + LOSS_TERMS
    assert max(image_of(figure).size) < 4000
    long = [{"step": s, "loss": 1.0} for s in range(10 * POINTS + 1)]
    figure = training_curves({"FCN": [long]})
    (line,) = figure.axes[1].lines
    assert len(line.get_xdata()) <= POINTS and line.get_xdata()[0] == 0
    few = [{"step": s, "loss": 1.0} for s in range(POINTS)]
    (line,) = training_curves({"FCN": [few]}).axes[1].lines
    assert len(line.get_xdata()) == POINTS


def test_numbers_that_cannot_be_drawn() -> None:
    odd = [math.nan, math.inf, -math.inf, 1e308, -1e308, 2**63 - 1, 0.0]
    assert np.isfinite(drawable(odd)).tolist() == [False] * 5 + [True] * 2
    history = [
        {"step": s, "lr": value, "loss": value, "losses": {"a": value}}
        | {"memory": {"mean": [value], "std": [value]}}
        | {"metrics": {"mean_iou": value, "classes": []}}
        for s, value in enumerate(odd)
    ]
    assert png(training_curves({"FCN": [history]}))
    chart = memory_over_time(history, ["a"], np.zeros((1, 3), np.uint8))
    assert chart is not None and png(chart)
    assert png(memory_chart(np.array([[v, v] for v in odd]), ["a"] * 7, np.zeros((7, 3), np.uint8)))
    assert png(class_bars(["a"] * 7, {"FCN": [odd]}))


def test_memories_of_other_classes_are_left_out() -> None:
    line = {"step": 1, "memory": {"mean": [0.0], "std": [1.0]}}
    assert memory_over_time([line], ["a", "b"], np.zeros((2, 3), np.uint8)) is None


def test_the_report_of_a_hostile_run(security_run: Path, security_data: Path) -> None:
    """Class names and 600 losses, from the command line, in time and memory."""
    run = Run(security_run)
    config = run.config()
    config["data"]["root"] = str(security_data)
    (security_run / "config.json").write_text(json.dumps(config))
    (security_data / "classes.txt").unlink()
    names = [r"$\frac{1}$", "<script>x</script>", "y" * 255]
    (security_data / "classes.json").write_text(json.dumps(names))
    for step in range(1, 50):
        run.record(step=step, loss=1.0, lr=0.1, losses={f"${i}": 1.0 for i in range(600)})
    outcome = RUN_ENTRIES["report"](security_run)
    assert outcome.value == 0, outcome
    page = (security_run.parent / "out" / "report.html").read_text()
    assert "<script" not in page and len(page) < 10_000_000
    assert f"{600 + 3 - LOSS_TERMS} more terms of the loss are not shown" in page
