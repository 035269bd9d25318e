"""Trains, measures and compares the rows of one of the paper's tables on one dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcibi_fast.ablations import configure, results
from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.ablations.runs import TrainedRun, holds
from mcibi_fast.ablations.table import Row, Table
from mcibi_fast.files import write_atomically, write_text
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.terminal import say


@dataclass(frozen=True)
class Planned:
    """One row with one seed, and the run whose numbers it shows."""

    row: Row
    seed: int
    run: TrainedRun


@dataclass
class Ablation:
    """One table on one dataset.

    Attributes:
        data: the dataset's name.
        table: the table.
        rows: the rows that were asked for.
        base: the configuration that they share.
        plan: all rows with the first seed, then all with the next.
        folder: where the results are written.
        measured: scores by row and seed.
    """

    data: str
    table: Table
    rows: list[Row]
    base: TrainConfig
    plan: list[Planned]
    folder: Path
    measured: dict[str, dict[int, results.Scores]]

    def carry_out(self) -> Iterator[Planned]:
        """Trains and measures, one after another, the rows that have no results yet.

        Raises:
            KeyboardInterrupt: after Ctrl-C; finished work is kept.
        """
        for planned in self.plan:
            row, run = planned.row, planned.run
            line = (
                f"row {self.rows.index(row) + 1}/{len(self.rows)} {row.name}, seed {planned.seed}"
            )
            tell(f"{line}: {'already done' if run.has(row) else run.folder}")
            try:
                if not run.is_trained():
                    run.train(lambda text: tell(f"  {text}"))
                scores = run.scores(row)
            except KeyboardInterrupt:
                message = f"stopped at {line}; the same command continues there"
                raise KeyboardInterrupt(message) from None
            self.measured.setdefault(row.name, {})[planned.seed] = scores
            yield planned

    def write(self) -> None:
        """Writes ``results.json`` and ``results.md``."""
        if not _is_main():
            return
        content = {
            "title": self.table.title,
            "source": self.table.source,
            "base": self.base.to_dict(),
            "rows": results.as_data(self.table, self.rows, self.measured),
            "remarks": self._remarks(),
            "runs": {p.run.folder.name: p.run.environment for p in self._done()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(content, indent=2) + "\n").encode()
        write_atomically(self.folder / "results.json", data)
        write_text(self.folder / "results.md", self.report() + "\n")

    def announcement(self) -> str:
        """What will be done: the base, and what each row changes."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.table.title} ({self.table.source})", f"base: {self._base()}"]
        lines += [
            f"{number:3} {row.name.ljust(width)}  {row.difference()}"
            for number, row in enumerate(self.rows, 1)
        ]
        return "\n".join(lines)

    def report(self) -> str:
        """The table in Markdown, and under it how its numbers were measured."""
        seeds = sorted({p.seed for p in self._done()})
        spread = ": mean ± standard deviation" if len(seeds) > 1 else ""
        versus = {self.table.versus(row) for row in self.rows}
        first = f" Δ is to the row {versus.pop()}." if len(versus) == 1 else ""
        facts = {
            tuple(p.run.environment[key] for key in ("commit", "mcibi_fast", "torch", "device"))
            + (p.run.environment["threads"],): None
            for p in self._done()
        }
        made_with = [
            f"Commit {commit}, mcibi_fast {version}, torch {torch}, {device}, {threads} thread(s)."
            for commit, version, torch, device, threads in facts
        ]
        parts = [
            f"**{self.table.title[0].upper()}{self.table.title[1:]}**",
            results.markdown(self.table, self.rows, self.measured),
            f"Paper: {self.table.source}. Measured: {self._base()}; seed "
            f"{', '.join(map(str, seeds))}{spread}."
            f"{first} {self.table.note}".rstrip(),
            *self._remarks(),
            *made_with,
        ]
        return "\n\n".join(parts)

    def _base(self) -> str:
        config = self.base
        options = "".join(f", {name} {value}" for name, value in config.model.options.items())
        return (
            f"{self.data}, {config.model.name}, {config.model.backbone}{options}, epochs "
            f"{config.epochs}, batch_size {config.batch_size}, tested by: {config.inference}"
        )

    def _remarks(self) -> list[str]:
        """The remarks of the measurements; a remark that is not about all rows names its rows."""
        rows: dict[str, dict[str, None]] = {}
        for planned in self._done():
            for text in planned.run.remarks:
                rows.setdefault(text, {})[planned.row.name] = None
        every = {planned.row.name for planned in self._done()}
        return [
            text if set(names) == every else f"{', '.join(names)}: {text}"
            for text, names in rows.items()
        ]

    def _done(self) -> list[Planned]:
        return [p for p in self.plan if p.seed in self.measured.get(p.row.name, {})]


def prepare(
    name: str,
    *,
    data: str | None,
    root: str | None,
    test_root: str | None,
    out: str | None,
    seeds: int,
    rows: str | None,
    settings: Sequence[str],
    progress: bool,
) -> Ablation:
    """Plans a table's runs, and checks everything that can be wrong before anything is trained.

    Args:
        name: the table's name.
        data, root: the dataset and its folder; by default the table's own dataset.
        test_root: folder of the dataset that the models are tested on, if it is another one.
        out: folder of all runs; ``runs/ablate/DATA`` by default.
        seeds: number of seeds, counted from 0.
        rows: names or numbers of rows, separated by commas; all rows by default.
        settings: changes to all rows, as ``--set`` takes them.
        progress: show how far it is.

    Raises:
        ValueError: an argument, the data or an option cannot be used, or a directory holds a run
            with another configuration.
        OSError: a folder is missing.
    """
    if name not in TABLES:
        raise ValueError(f"ablate: no table {name!r}; there are {', '.join(TABLES)}")
    if seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {seeds}")
    table = TABLES[name]
    data = data or table.default_data
    chosen = configure.select_rows(table, rows)
    base = configure.base_config(table, data, root, settings)
    configure.check_test_data(table, test_root)
    folder = Path(out or f"runs/ablate/{data}")
    backbone = configure.usual_backbone(data, root)
    runs: dict[str, TrainedRun] = {}
    plan = []
    for seed in range(seeds):
        for row in chosen:
            run = configure.run_name(base, row, seed, backbone)
            if run not in runs:
                config = configure.row_config(base, row, seed)
                earlier = folder / configure.run_name(base, row, seed)
                runs[run] = TrainedRun(
                    config,
                    earlier if holds(earlier, config) else folder / run,
                    test_root=test_root,
                    progress=progress,
                )
            plan.append(Planned(row, seed, runs[run]))
    configure.check_models([planned.run.config for planned in plan if planned.seed == 0])
    return Ablation(data, table, chosen, base, plan, folder / f"table-{name}", {})


def list_tables() -> str:
    """A text that lists all tables."""
    width = max(map(len, TABLES))
    lines = [
        f"{name.ljust(width)}  {table.title} ({len(table.rows)} rows)"
        for name, table in TABLES.items()
    ]
    return "\n".join([*lines, "mcibi-fast ablate TABLE trains and compares; see --help"])


def tell(text: str) -> None:
    """Prints the text; of several processes only the first one does."""
    if _is_main():
        say(text)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
