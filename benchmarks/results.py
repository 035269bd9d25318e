"""The results of a benchmark: the printed table, JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
COLUMNS = {  # of the printed table: key, heading, format
    "candidate": ("", "{}"),
    "median_ms": ("ms", "{:.3g}"),
    "spread": ("10-90 %", "{}"),
    "times_ours": ("/ ours", "{:.2f}"),
    "extra_MiB": ("extra MiB", "{:.1f}"),
    "share_of_limit": ("of limit", "{:.0%}"),
    "host_syncs": ("host syncs", "{}"),
    "times_image": ("multiply-adds / image", "{:.3f}"),
}


def table(rows: list[Row]) -> str:
    """The rows of one case as text, the limit below."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    text = [[heading for heading, _ in columns.values()]]
    for row in rows:
        text.append(
            [
                "-" if row.get(key) is None else form.format(row[key])
                for key, (_, form) in columns.items()
            ]
        )
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    lines = []
    for line in text:
        cells = [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]))
    ours = rows[-1]
    lines.append(f"limit {ours['limit_ms']:.3g} ms ({ours['limited_by']}); ours: {ours['backend']}")
    return "\n".join("  " + line for line in lines)


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes <op>-<device>.json, and .csv with one line per candidate and the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    env = report["environment"]
    path = folder / f"{report['op']}-{device_name(env)}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        columns = dict.fromkeys(key for row in report["rows"] for key in row)
        writer = csv.DictWriter(file, [*columns, *env])
        writer.writeheader()
        writer.writerows({**row, **env} for row in report["rows"])
    print(f"\nwrote {path}.json and .csv")


def device_name(environment: dict[str, Any]) -> str:
    """Device and threads as part of a file's name."""
    name = f"{environment['device']}_{environment['threads']}t"
    return "".join(c if c.isalnum() else "_" for c in name)
