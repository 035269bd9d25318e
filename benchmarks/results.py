"""Results of the benchmarks: their format, writing and reading them, and tables as text.

A result is one table: what was measured, where, and its rows. It is written as
``<benchmark>-<device>_<threads>t.json``; a CSV file beside it has the same rows, each with the
environment.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.machine import ROOT
from mcibi_fast.files import write_atomically
from mcibi_fast.training.environment import environment

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
COLUMNS = {  # columns of the printed table of a case: key, heading, format
    "candidate": ("", "{}"),
    "median_ms": ("ms", "{:.3g}"),
    "spread": ("10-90 %", "{}"),
    "times_ours": ("/ ours", "{:.2f}"),
    "host_us": ("host us", "{:.0f}"),
    "graph_ms": ("graph ms", "{:.3g}"),
    "graph_host_us": ("graph host us", "{:.0f}"),
    "extra_MiB": ("extra MiB", "{:.1f}"),
    "share_of_limit": ("of limit", "{:.0%}"),
    "host_syncs": ("host syncs", "{}"),
    "times_image": ("multiply-adds / image", "{:.3f}"),
}


class Result(TypedDict):
    """What a benchmark measured; JSON can hold it.

    Attributes:
        benchmark: the benchmark's name.
        environment: device, threads, versions, commit and time, see `training.environment`.
        limits: by dtype, the rates that the machine reached in the same run: ``copy_GB_s`` and
            ``matmul_GFLOP_s``; empty if they were not measured.
        keys: the columns that distinguish the cases; "candidate" distinguishes the rows of a case,
            and all other columns are measurements.
        rows: one dictionary per row. A column that does not apply to a row is left out.
        failures: one line for each case that failed.
        cases_left_out: number of cases that were not begun because the time was up.
    """

    benchmark: str
    environment: dict[str, Any]
    limits: dict[str, dict[str, float]]
    keys: list[str]
    rows: list[Row]
    failures: list[str]
    cases_left_out: int


def result_of(
    benchmark: str, device: str, keys: Iterable[str] = (), rows: Iterable[Row] = ()
) -> Result:
    """A result measured on this machine; ``device`` is "cpu" or "cuda"."""
    return {
        "benchmark": benchmark,
        "environment": environment(device),
        "limits": {},
        "keys": list(keys),
        "rows": list(rows),
        "failures": [],
        "cases_left_out": 0,
    }


# ---- files -------------------------------------------------------------------


def write(result: Result, folder: Path) -> Path:
    """Writes the JSON file and the CSV file beside it; returns the path of the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{device_name(result)}.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    columns = dict.fromkeys(column for row in result["rows"] for column in row)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["benchmark", *columns, *result["environment"]])
        writer.writeheader()
        where = result["environment"]
        writer.writerows(
            {"benchmark": result["benchmark"], **row, **where} for row in result["rows"]
        )
    return path


def resume(result: Result, folder: Path) -> None:
    """Takes the rows over from the result of the same name and device, if there is one."""
    path = folder / f"{result['benchmark']}-{device_name(result)}.json"
    if path.exists():
        before = json.loads(path.read_text())
        for key in ("limits", "keys", "rows"):
            result[key] = before[key]  # type: ignore[literal-required]


def read(folder: Path) -> list[Result]:
    """All results in a folder and its subfolders, in the order of their paths."""
    found = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    return [r for r in found if isinstance(r, dict) and r.keys() == Result.__annotations__.keys()]


def device_name(result: Result) -> str:
    """Device and threads as part of a file's name."""
    name = f"{result['environment']['device']}_{result['environment']['threads']}t"
    return "".join(c if c.isalnum() else "_" for c in name)


# ---- text --------------------------------------------------------------------


def case_table(rows: Sequence[Row]) -> str:
    """The rows of one case as text, with the limit below."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else form.format(value)

    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    lines = [[heading for heading, _ in columns.values()]]
    lines += [[cell(row.get(k), form) for k, (_, form) in columns.items()] for row in rows]
    ours = rows[-1]
    limit = f"limit {ours['limit_ms']:.3g} ms ({ours['limited_by']}); ours: {ours['backend']}"
    return "\n".join("  " + line for line in [*_aligned(lines), limit])


def table(rows: Sequence[Row], digits: int) -> str:
    """Rows with the same columns as text; floats have ``digits`` digits after the point."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    return "\n".join(_aligned([list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]))


def _aligned(lines: list[list[str]]) -> list[str]:
    """The first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
