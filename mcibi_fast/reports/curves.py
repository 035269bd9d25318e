"""The section "Training": curves of the scores, the losses and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

from matplotlib.figure import Figure

from mcibi_fast.reports.charts import COLOURS, axes_of, drawable, plain, png, thinned
from mcibi_fast.reports.page import Report

History = Sequence[dict[str, Any]]
"""The lines of a run's history (`training.run.Run.history`)."""

LOSS_TERMS = 24
"""Largest number of the loss's terms that are drawn, each in a panel; the first ones are."""

_STYLES = ("-", "--", ":", "-.")
LINES = len(COLOURS) * len(_STYLES)
"""Number of models whose curves can be told apart, by colour and style."""

_TERMS = {
    "loss": "loss (sum of its terms)",
    "loss_cls": "loss_cls: of the prediction O (Eq. 15)",
    "loss_pr": "loss_pr: of the weights W (Eq. 14)",
    "loss_cwi": "loss_cwi: of the within-image head",
    "loss_aux": "loss_aux: of the auxiliary head",
}


def add_curves(report: Report, histories: Mapping[str, Sequence[History]]) -> None:
    """Adds the section; ``histories`` holds, for each model's name, those of its runs."""
    report.heading("Training")
    more = len(loss_terms(histories)) - LOSS_TERMS
    left_out = f" {more} more terms of the loss are not shown." if more > 0 else ""
    report.picture(
        png(training_curves(histories)),
        "mIoU on the validation split, learning rate, and the loss with its weighted terms. The "
        "sums of models with different terms cannot be compared, the single terms can." + left_out,
        name="curves",
        wide=True,
    )


def loss_terms(histories: Mapping[str, Sequence[History]]) -> list[str]:
    """The names of the loss's terms, in the order in which they occur."""
    every = (entry for runs in histories.values() for history in runs for entry in history)
    return list(dict.fromkeys(name for entry in every for name in entry.get("losses", ())))


def training_curves(histories: Mapping[str, Sequence[History]]) -> Figure:
    """mIoU, learning rate, and the loss with each of its terms against the step.

    Args:
        histories: for each model's name, the histories of its runs; one colour and style per
            model, one line per run. The panel of a term shows the models that have it;
            `LOSS_TERMS` are shown.
    """
    terms = loss_terms(histories)[:LOSS_TERMS]
    titles = ["mIoU on the validation split (%)", "loss (sum of its terms)", "learning rate"]
    titles += [_TERMS.get(name, name) for name in terms]
    columns = 3
    rows = -(-len(titles) // columns)
    figure, panels = axes_of(rows, columns, size=(11.5, 2.7 * rows + 0.5))
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(plain(title), fontsize=10, loc="left")
    for axes in panels[len(titles) :]:
        axes.remove()
    looks = cycle((colour, style) for style, colour in product(_STYLES, COLOURS))
    for (colour, style), (name, runs) in zip(looks, histories.items(), strict=False):
        for i, history in enumerate(runs):
            lines = [_scores(history), _values(history, "loss"), _values(history, "lr")]
            lines += [_values(history, "losses", term) for term in terms]
            label = plain(name) if i == 0 else None
            for j, (axes, line) in enumerate(zip(panels, lines, strict=False)):
                if line:
                    mark = "." if j == 0 else None
                    axes.plot(
                        *zip(*line, strict=True),
                        color=colour,
                        ls=style,
                        lw=1.3,
                        marker=mark,
                        label=label,
                    )
                    label = None  # one entry of the legend for all panels
    for axes in panels[: len(titles)]:
        axes.set(xlim=(0, None), ylim=(0, None))
    for axes in panels[max(0, len(titles) - columns) : len(titles)]:
        axes.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _values(history: History, *keys: str) -> list[tuple[int, float]]:
    points = []
    for entry in history:
        value: Any = entry
        for key in keys:
            value = value.get(key, {})
        if isinstance(value, (int, float)):
            points.append((entry["step"], value))
    steps, values = zip(*thinned(points), strict=True) if points else ((), ())
    return list(zip(steps, drawable(values).tolist(), strict=True))


def _scores(history: History) -> list[tuple[int, float]]:
    return [(step, 100 * value) for step, value in _values(history, "metrics", "mean_iou")]
