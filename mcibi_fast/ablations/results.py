"""The paper's numbers beside the measured ones: as data, and as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mcibi_fast.ablations.table import Column, Row, Scores, Table

Measured = Mapping[str, Mapping[int, Scores]]
"""Scores by row and seed; rows that have no scores yet have no entry."""


def as_data(table: Table, rows: Sequence[Row], measured: Measured) -> list[dict[str, Any]]:
    """One entry per row, ready for JSON: the paper's numbers, each seed's, mean and deviation."""
    entries = []
    for row in rows:
        runs = measured.get(row.name, {})
        found = {column.score: _values(runs, column) for column in table.columns}
        entries.append(
            {
                "row": row.name,
                "settings": list(row.settings),
                "paper": dict(zip(table.paper, row.paper, strict=True)) if row.paper else {},
                "seeds": {str(seed): dict(scores) for seed, scores in runs.items()},
                "mean": {name: statistics.mean(v) for name, v in found.items() if v},
                "std": {name: statistics.stdev(v) for name, v in found.items() if len(v) > 1},
                "versus": table.versus(row),
                "differences": differences(table, row, measured),
            }
        )
    return entries


def differences(table: Table, row: Row, measured: Measured) -> list[float]:
    """Differences in the first column to the row it is compared with, for each seed of both."""
    name, other = table.columns[0].score, table.versus(row)
    if other == row.name:
        return []
    runs, others = measured.get(row.name, {}), measured.get(other, {})
    return [runs[seed][name] - others[seed][name] for seed in runs if seed in others]


def markdown(table: Table, rows: Sequence[Row], measured: Measured) -> str:
    """The table in Markdown; its columns are aligned in plain text, too."""
    has_paper = any(row.paper for row in table.rows)
    header = ["row"]
    if has_paper:
        header += [f"paper {name}" for name in table.paper] + ["Δ"]
    header += [table.columns[0].heading, "Δ", *(column.heading for column in table.columns[1:])]
    lines = [header]
    for row in rows:
        cells = [row.name]
        if has_paper:
            printed = row.paper or (None,) * len(table.paper)
            cells += [_printed(value) for value in printed]
            cells.append(_printed_difference(table, row))
        runs = measured.get(row.name, {})
        first, *others = [mean_and_spread(_values(runs, c), c.digits) for c in table.columns]
        gains = differences(table, row, measured)
        lines.append([*cells, first, mean_and_spread(gains, signed=True), *others])
    return _aligned(lines)


def mean_and_spread(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Mean ± standard deviation over seeds; "-" if there are no values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _values(runs: Mapping[int, Scores], column: Column) -> list[float]:
    return [scores[column.score] for scores in runs.values() if column.score in scores]


def _printed(value: float | None) -> str:
    """The number with two digits after the point, or more if the paper prints more."""
    return "-" if value is None else max(f"{value:.2f}", f"{value:g}", key=len)


def _printed_difference(table: Table, row: Row) -> str:
    """The difference in the first column for which the paper prints both rows."""
    if (other := table.versus(row)) == row.name:
        return "-"
    theirs = next(each.paper for each in table.rows if each.name == other)
    pairs = zip(row.paper, theirs, strict=False)
    found = [mine - its for mine, its in pairs if mine is not None and its is not None]
    return f"{found[0]:+.2f}" if found else "-"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]

    def text(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    header, *body = (f"| {text(line)} |" for line in lines)
    return "\n".join([header, f"|{rule}|", *body])
