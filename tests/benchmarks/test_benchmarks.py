"""Every benchmark runs, agrees and writes its results, at a size that takes no time."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import (
    bench_class_rank_attention,
    bench_confidence_attention,
    bench_context,
    bench_dropin,
    bench_gaussian_aggregate,
    bench_head,
    bench_inference,
    bench_loader,
    bench_memory_update,
    bench_model,
    bench_upsample_argmax,
    bench_upsample_cross_entropy,
    bench_video,
    dropin_models,
)
from benchmarks.cases import Case
from benchmarks.results import read, write

f32, BOTH = torch.float32, "forward+backward"
SMALL: dict[ModuleType, Callable[[], Case]] = {
    bench_memory_update: lambda: bench_memory_update.case(5, 8, 64, f32, "cpu"),
    bench_gaussian_aggregate: lambda: bench_gaussian_aggregate.case(
        5, 8, BOTH, f32, "cpu", compiled=False
    ),
    bench_class_rank_attention: lambda: bench_class_rank_attention.case(
        5, 8, False, BOTH, f32, "cpu"
    ),
    bench_confidence_attention: lambda: bench_confidence_attention.case(8, 16, BOTH, f32, "cpu"),
    bench_upsample_cross_entropy: lambda: bench_upsample_cross_entropy.case(5, 8, BOTH, f32, "cpu"),
    bench_upsample_argmax: lambda: bench_upsample_argmax.case(5, 8, "smooth", "counts", f32, "cpu"),
    bench_context: lambda: bench_context.case(5, 8, "paper", BOTH, f32, "cpu"),
    bench_dropin: lambda: bench_dropin.case(
        "torchvision",
        "lraspp_mobilenet_v3_large",
        dropin_models.torchvision_model,
        5,
        64,
        "train",
        "cpu",
    ),
    bench_head: lambda: bench_head.case("fcn_mcibipp", 4, "paper", BOTH, f32, "cpu"),
    bench_model: lambda: bench_model.case(
        "inference", 2, "paper", f32, "cpu", size=64, backbone="resnet18"
    ),
    bench_loader: lambda: bench_loader.case("camvid", 2, 60),
    bench_inference: lambda: bench_inference.case(
        "fcn_mcibipp", "resnet18", 5, (64, 72), packages=False
    ),
    bench_video: lambda: bench_video.frame_case("paper", "cpu", size=64, backbone="resnet18", Z=32),
}


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__.rpartition(".")[2])
def test_measures_and_writes(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cases", lambda *_: [SMALL[module]])
    results = module.run("cpu", quick=True)
    report = results[0]
    assert report["rows"][-1]["candidate"] == "ours" and report["rows"][-1]["times_ours"] == 1
    assert all(row["median_ms"] > 0 for row in report["rows"])
    assert {"device", "torch", "commit", "threads"} <= set(report["environment"])
    assert report["keys"] == [*SMALL[module]().sizes, "dtype"]
    paths = [write(result, tmp_path) for result in results]
    assert read(tmp_path) == results and sorted(paths) == sorted(tmp_path.glob("*.json"))
    for path, result in zip(paths, results, strict=True):
        assert path.name.startswith(module.__name__.rpartition("bench_")[2])
        with path.with_suffix(".csv").open() as file:
            lines = list(csv.DictReader(file))
        for line, row in zip(lines, result["rows"], strict=True):
            shown = {name: "" if value is None else str(value) for name, value in row.items()}
            assert line.items() >= shown.items()
            assert line["benchmark"] == result["benchmark"] and line["commit"]


def test_the_model_waits_for_nothing_at_inference() -> None:
    case = SMALL[bench_model]()
    counts = {c.name: c.counts()["host_syncs"] for c in case.candidates if c.counts}
    assert counts == {"released": 2 * 2 * bench_model.K, "ours": 0}
