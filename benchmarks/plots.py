"""Pictures of the results: ``mcibi-fast bench plot``, or ``python -m benchmarks.plots``.

roofline-<device>.png         for each of our kernels operations per second over operations per
                              byte, and as limits the rates of copies and matrix products that were
                              measured in the same run
<benchmark>-<device>-N.png    time over N = h w, a line for each candidate; cases that differ in
                              other sizes, too, have their own panels
<benchmark>-<device>-K.png    the same over K
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import RESULTS, Result, Row, device_name


def read(folder: Path) -> dict[str, list[Result]]:
    """All results in a folder that have rows, by device.

    Raises:
        ValueError: there are no results.
    """
    by_device = defaultdict(list)
    for result in results.read(folder):
        if result["rows"]:
            by_device[device_name(result)].append(result)
    if not by_device:
        raise ValueError(f"plot: no results of a benchmark in {folder}; run one first")
    return dict(by_device)


def draw(by_device: dict[str, list[Result]], out: Path) -> list[Path]:
    """Draws every picture for which the results have data; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for device, of_device in by_device.items():
        if any(points(result) for result in of_device):
            written.append(out / f"roofline-{device}.png")
            roofline(of_device, written[-1])
        for result in of_device:
            for axis in ("N", "K"):
                panels = list(curves(result, axis))
                if panels:
                    written.append(out / f"{result['benchmark']}-{device}-{axis}.png")
                    cost(result["benchmark"], axis, panels, written[-1])
    return written


# ---- roofline ----------------------------------------------------------------


def points(result: Result) -> list[Row]:
    """The rows of our kernels whose operations and bytes are counted."""
    return [r for r in result["rows"] if r.get("candidate") == "ours" and r.get("flops")]


def roofline(of_device: list[Result], path: Path) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    drawn = [(result, rows) for result in of_device if (rows := points(result))]
    intensities = [row["flops"] / row["bytes"] for _, rows in drawn for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    dtypes = sorted({row["dtype"] for _, rows in drawn for row in rows})
    for i, dtype in enumerate(dtypes):
        rates = [r["limits"][dtype] for r in of_device if dtype in r["limits"]]
        copy = max(rate["copy_GB_s"] for rate in rates)
        matmul = max(rate["matmul_GFLOP_s"] for rate in rates)
        low, high = min(low, matmul / copy / 2), max(high, matmul / copy * 2)
        label = f"limit, {dtype}: copies {copy:.3g} GB/s, products {matmul:.3g} GFLOP/s"
        knee = matmul / copy
        style = {"color": "black", "linestyle": ("-", "--", ":")[i % 3]}
        axes.plot([low, knee, high], [low * copy, matmul, matmul], label=label, **style)
    for i, (result, rows) in enumerate(drawn):
        for j, dtype in enumerate(dtypes):
            some = [row for row in rows if row["dtype"] == dtype]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in some],
                [row["flops"] / row["median_ms"] / 1e6 for row in some],
                label=result["benchmark"] if some and j == dtypes.index(rows[0]["dtype"]) else None,
                color=f"C{i}",
                marker="osD^"[j % 4],
            )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.set_title(_device(of_device[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- cost against a size -----------------------------------------------------

Panel = tuple[str, dict[str, list[tuple[float, float]]]]  # title, candidate -> (size, ms)


def curves(result: Result, axis: str) -> Iterator[Panel]:
    """Groups of cases that differ only in N (or K), with at least two sizes."""
    groups: dict[tuple[tuple[str, Any], ...], list[tuple[float, Row]]] = defaultdict(list)
    for row in result["rows"]:
        x = row.get("map", 0) ** 2 if axis == "N" else row.get("K")
        if x and "median_ms" in row:  # the sweep has none
            along = {"N", "map", "labels"} if axis == "N" else {"K"}
            if "N" in row:
                along.add("map")
            fixed = {k: row[k] for k in result["keys"] if k in row and k not in along}
            groups[tuple(fixed.items())].append((x, row))
    for fixed, members in groups.items():
        lines = defaultdict(list)
        for x, row in sorted(members, key=lambda member: member[0]):
            lines[row["candidate"]].append((x, row["median_ms"]))
        if len({x for x, _ in members}) > 1:
            yield ", ".join(f"{k} {v}" for k, v in fixed), dict(lines)


def cost(op: str, axis: str, panels: list[Panel], path: Path) -> None:
    plt = _pyplot()
    columns = min(len(panels), 3)
    count = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        count, columns, figsize=(4.5 * columns, 3.5 * count), layout="constrained", squeeze=False
    )
    colours = {
        name: f"C{i}" for i, name in enumerate(dict.fromkeys(n for _, p in panels for n in p))
    }
    for axes, (title, lines) in zip(grid.flat, panels, strict=False):
        for name, line in lines.items():
            width = 2.5 if name == "ours" else 1.2
            axes.plot(*zip(*line, strict=True), "o-", label=name, color=colours[name], lw=width)
        sizes = sorted({x for line in lines.values() for x, _ in line})
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xticks([], minor=True)
        axes.set_title(title, fontsize="small")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(op)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _device(result: Result) -> str:
    environment = result["environment"]
    threads = environment["threads"]
    return environment["device"] + ("" if environment["cuda"] else f", CPU threads: {threads}")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: RESULTS/plots)")
    options = parser.parse_args()
    try:
        written = draw(read(options.results), options.out or options.results / "plots")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
