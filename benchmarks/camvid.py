"""What training on CamVid gave: ``python -m benchmarks.camvid {score,write} RUNS``.

``score`` evaluates every finished run below RUNS (folders of ``mcibi-fast ablate``) on the
validation and the test split, from one view and from many, and with the labels as W; it measures
how well W and the memory know the classes, and keeps all of it in each run's ``scores.json``.
``write`` makes from these files a page with tables and curves in docs/results, and copies the runs'
small files there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mcibi_fast.ablations.runs import MEASURED
from mcibi_fast.ablations.stages import StageWeights
from mcibi_fast.files import write_atomically
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.metrics.confusion import SegmentationMetrics
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.parts import InferenceConfig
from mcibi_fast.reports.gathering import collect
from mcibi_fast.training.run import Run

SCORES = "scores.json"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # section 4.1
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
MANY = InferenceConfig(scales=SCALES, flip=True)


def finished(runs: Path) -> Iterator[Path]:
    """The folders of runs whose training has ended, by name."""
    for file in sorted(runs.glob(f"*/{MEASURED}")):
        if "training" in json.loads(file.read_text()):
            yield file.parent


def score(folder: Path, report: Callable[[str], None] = print) -> None:
    """Measures what a run's ``scores.json`` does not hold yet."""
    file = folder / SCORES
    scores: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name, measure in _measures(folder):
        if name not in scores:
            scores[name] = measure()
            write_atomically(file, (json.dumps(scores, indent=1) + "\n").encode())
            report(f"{folder.name}: {name} {_short(scores[name])}")


def from_one_view(config: TrainConfig) -> InferenceConfig:
    """A run's own way to test, without further scales and mirroring."""
    return replace(config.inference, scales=(1.0,), flip=False)


def evaluated(
    config: TrainConfig, model: Any, split: str, inference: InferenceConfig
) -> SegmentationMetrics:
    """The scores of a run's model on a split, in float32."""
    dataset = config.data.dataset(split)
    return evaluate(
        model, dataset, inference=inference, batch_size=4, workers=1, precision="no"
    ).compute()


def _measures(folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    config = Run(folder).settings()
    model, spec = load_model(folder / "checkpoints" / "last")

    def metrics(split: str, inference: InferenceConfig, shown: Any = model) -> dict[str, Any]:
        return evaluated(config, shown, split, inference).as_dict(spec.classes)

    def with_labels() -> Any:
        """The model that gathers with the labels instead of W, as in Table 1."""
        return load_model(folder / "checkpoints" / "last", weights_from="labels")[0]

    one = from_one_view(config)
    measures: list[tuple[str, Callable[[], Any]]] = [
        ("val", lambda: metrics("val", one)),
        ("test", lambda: metrics("test", one)),
    ]
    if model.head.has_memory:
        two = replace(one, stages=2)
        measures += [
            ("val, two stages", lambda: metrics("val", two)),
            ("val, W", lambda: metrics("val", replace(one, stages=None), StageWeights(model, 1))),
            ("val, W = labels", lambda: metrics("val", one, with_labels())),
            ("codes", lambda: codes(model, config.data.dataset("val"))),
        ]
    return [
        *measures,
        ("val, many views", lambda: metrics("val", MANY)),
        ("test, many views", lambda: metrics("test", MANY)),
    ]


def codes(model: Any, dataset: Any) -> dict[str, float]:
    """How well C_dl, and the memory's numbers, tell the classes of the features apart.

    In percent: for the mean R of each class in each image, how often the class of the nearest
    representation (by cosine, both minus their mean over classes) is its own; the same with the
    features' own class means over the split instead, which is what a memory of representations can
    reach at best; and by chance.
    """
    found = collect(model, dataset, range(len(dataset)))
    R, classes = torch.from_numpy(found.R), torch.from_numpy(found.classes)
    table = model.memory.representations().detach().float()
    present = classes.unique()  # rows of the classes that never occur are left out
    rows = torch.searchsorted(present, classes)
    means = torch.stack([R[rows == k].mean(0) for k in range(len(present))])

    def matched(centres: torch.Tensor) -> float:
        near = F.normalize(R - R.mean(0)) @ F.normalize(centres - centres.mean(0)).T
        return 100 * float((near.argmax(1) == rows).float().mean())

    return {
        "matched by C_dl": matched(table[present]),
        "matched by class means": matched(means),
        "chance": 100 / len(present),
    }


def _short(value: dict[str, Any]) -> str:
    if "mean_iou" in value:
        return f"mIoU {100 * value['mean_iou']:.2f}"
    return ", ".join(f"{name} {number:.2f}" for name, number in value.items())


# --- the page ------------------------------------------------------------------------------------


def write(runs: Path, docs: Path) -> None:
    """Writes the tables into ``camvid.md``, its picture and the runs' small files.

    What the page says besides, outside the two marks, stays.
    """
    folders = list(finished(runs))
    kinds: dict[str, list[Path]] = {}
    for folder in folders:
        kinds.setdefault(folder.name.rpartition("-seed")[0], []).append(folder)
    docs.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        _copy(folder, docs / "camvid" / folder.name)
    _draw_curves(kinds, docs / "camvid_curves.png")
    tables = [_scores_table(kinds), _classes_table(kinds), _codes_table(kinds)]
    page = docs / "camvid.md"
    text = page.read_text() if page.is_file() else f"# CamVid\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    content = "\n\n".join(table for table in tables if table)
    write_atomically(page, f"{before}{BEGIN}\n\n{content}\n\n{END}{after}".encode())
    print(page)


def _copy(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "history.jsonl", MEASURED, SCORES):
        if (folder / name).is_file():
            text = (folder / name).read_text()
            if name == "config.json":  # where the data lay on that machine is of no interest
                config = json.loads(text)
                config["data"]["root"] = "DATA/camvid"
                text = json.dumps(config, indent=2) + "\n"
            write_atomically(to / name, text.encode())


def _scored(folders: list[Path], name: str) -> list[dict[str, Any]]:
    files = [folder / SCORES for folder in folders if (folder / SCORES).is_file()]
    return [s[name] for s in map(json.loads, (f.read_text() for f in files)) if name in s]


def _mean(values: list[float], digits: int = 2) -> str:
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _scores_table(kinds: dict[str, list[Path]]) -> str:
    columns = (
        *("val", "val, many views", "test", "test, many views"),
        *("val, two stages", "val, W", "val, W = labels"),
    )
    rows = [["model", "seeds", *columns]]
    for kind, folders in kinds.items():
        cells = [
            _mean([100 * s["mean_iou"] for s in _scored(folders, column)]) for column in columns
        ]
        rows.append([kind, str(len(folders)), *cells])
    return "mIoU in percent, mean ± standard deviation over seeds:\n\n" + _markdown(rows)


def _classes_table(kinds: dict[str, list[Path]]) -> str:
    per_kind = {}
    for kind, folders in kinds.items():
        if scored := _scored(folders, "val"):
            per_kind[kind] = {
                row["class"]: statistics.mean(
                    100 * next(c["iou"] or 0.0 for c in s["classes"] if c["class"] == row["class"])
                    for s in scored
                )
                for row in scored[0]["classes"]
            }
    if not per_kind:
        return ""
    names = list(next(iter(per_kind.values())))
    rows = [["class", *per_kind]]
    rows += [[name, *(f"{ious[name]:.1f}" for ious in per_kind.values())] for name in names]
    return "IoU of each class on the validation split, mean over seeds:\n\n" + _markdown(rows)


def _codes_table(kinds: dict[str, list[Path]]) -> str:
    columns = ("matched by C_dl", "matched by class means", "chance")
    rows = [["model", *columns]]
    for kind, folders in kinds.items():
        if found := _scored(folders, "codes"):
            rows.append([kind, *(_mean([f[c] for f in found], 1) for c in columns)])
    return (
        "Class means of R in single images whose nearest representation is that of their class, "
        "in percent:\n\n" + _markdown(rows)
    )


def _markdown(rows: list[list[str]]) -> str:
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def _draw_curves(kinds: dict[str, list[Path]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, folders in kinds.items():
        curves: dict[int, list[float]] = {}
        for folder in folders:
            for entry in Run(folder).history():
                if "metrics" in entry:
                    curves.setdefault(entry["epoch"], []).append(100 * entry["metrics"]["mean_iou"])
        epochs = sorted(curves)
        axes.plot(epochs, [statistics.mean(curves[e]) for e in epochs], marker="o", label=kind)
    axes.set_xlabel("epoch")
    axes.set_ylabel("mIoU on the validation split, percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("score", "write"))
    parser.add_argument("runs", type=Path, help="folder of the runs, such as runs/ablate/camvid")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    if arguments.what == "write":
        write(arguments.runs, arguments.docs)
        return
    for folder in finished(arguments.runs):
        score(folder)


if __name__ == "__main__":
    main()
