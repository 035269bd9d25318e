"""Speed and memory of Table 15's methods: ``python -m benchmarks.table15_methods [--size 256]``.

train      losses, gradients and, with a memory, its update; without an optimizer; two images
inference  the class of every pixel of one image

All rows have the same backbone, one module, and the same fused ops: every loss upsamples in
``ops.upsample_cross_entropy`` and every prediction in ``ops.upsample_argmax``, so that a row
differs from FCN by its head alone. Memory is what a call needs besides weights and inputs.
Multiply-adds are those of all convolutions and matrix products of an inference.

Each row is written as soon as it is measured; the same command continues an interrupted run.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import check_in_float64
from benchmarks.harness import exit_status, randn, seeded
from benchmarks.machine import (
    count_processor_time,
    keep_freed_memory,
    peak_extra_memory,
    repeated,
)
from benchmarks.options import parsed, parser_of
from benchmarks.results import Result, Row, read, result_of, table, write
from mcibi_fast import models
from mcibi_fast.ablations.paper_methods import TABLE_15
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models import Segmentor
from mcibi_fast.models.counting import Counts, count
from mcibi_fast.models.outline import outline
from mcibi_fast.recipes import InferenceConfig

K, BATCH = 21, 2  # classes of VOC; pooling to 1x1 before a batch norm needs two images
FIRST = TABLE_15.rows[0].name  # the row that all others are compared with

METHODS = {row.name: row.settings[0].removeprefix("model.name=") for row in TABLE_15.rows}
"""The models by the names of the rows."""


def create(name: str, backbone: str, channels: int) -> Segmentor:
    """The model of a row, with the options that the row has of its own."""
    settings = {row.name: row.settings[1:] for row in TABLE_15.rows}[name]
    pairs = (setting.removeprefix("model.options.").split("=") for setting in settings)
    options = {option: json.loads(value) for option, value in pairs}
    return models.create(METHODS[name], K, backbone, feats_channels=channels, **options)


def train(model: Segmentor, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss and the gradients of all parameters that have one."""
    losses = model.train()(images, labels).losses
    loss = torch.stack(list(losses.values())).sum()
    trained = [p for p in model.parameters() if p.requires_grad]  # EMANet has frozen ones
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


def infer(model: Segmentor, images: Tensor) -> Tensor:
    """The class of every pixel."""
    with torch.inference_mode():
        return predict_labels(model.eval(), images, images.shape[2:], InferenceConfig())


def build(backbone: str, channels: int, device: str) -> dict[str, Segmentor]:
    """The models of all rows, which share a backbone, with equal weights in every run."""
    made: dict[str, Segmentor] = {}
    for name in METHODS:
        model: Segmentor = seeded(create, name, backbone, channels)
        if made:
            model.backbone = made[FIRST].backbone
        made[name] = model.to(device)
    return made


def counts(name: str, backbone: str, channels: int, size: int) -> Counts:
    """Parameters and multiply-adds of the inference of one image, without allocating memory."""
    model = outline(lambda: create(name, backbone, channels), 10**6)
    return count(model.eval(), torch.empty(1, 3, size, size, device="meta"))


def agreement(name: str, model: Segmentor, device: str, size: int = 64) -> None:
    """Compares the logits with those in float64 with the ops' references.

    At this size PointRend refines every pixel, so rounding does not decide which.

    Raises:
        Disagreement: they differ by more than rounding.
    """
    images = randn(1, 3, size, size, device=device)
    check_in_float64(name, {"image": size}, model.eval(), [images], lambda output: output.logits)


def measure(
    backbone: str, channels: int, size: int, device: str, budget: float, found: list[Row]
) -> Iterator[Row]:
    """The rows of the methods that are not among those found, one after another.

    Args:
        backbone: any backbone of `models.create`.
        channels: Z, channels of the pixel representations.
        size: side of the images, a multiple of 16.
        device: "cpu" or "cuda".
        budget: seconds for the times of each task; each method is timed at least once, after the
            call whose memory is measured.
        found: rows that have been measured before, the first row among them.

    Raises:
        Disagreement: a model's logits are wrong.
    """
    images = randn(BATCH, 3, size, size, device=device)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(K, (BATCH, size // 16, size // 16), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    first = next((row for row in found if row["method"] == FIRST), None)
    done = {row["method"] for row in found}
    for name, model in build(backbone, channels, device).items():
        if name in done:
            continue
        agreement(name, model, device)
        own = counts(name, backbone, channels, size)
        row: Row = {"method": name, "backbone": backbone, "size": size}
        row |= {"params_M": own.parameters / 1e6, "true_G": own.true / 1e9}
        first = first or row
        for task, run in (
            ("train", functools.partial(train, model, images, labels)),
            ("inference", functools.partial(infer, model, images[:1])),
        ):
            memory = peak_extra_memory(run, device)
            times = repeated(run, device, budget / len(METHODS))
            row[f"{task}_ms"] = 1e3 * statistics.median(times)
            row[f"{task}_times_FCN"] = row[f"{task}_ms"] / first[f"{task}_ms"]
            row[f"{task}_calls"] = len(times)
            row[f"{task}_extra_MiB"] = memory
        yield row


def begun(result: Result, folder: Path, backbone: str, size: int) -> Result:
    """The unfinished result in a folder of the same measurement, or the given one.

    It is the same if the machine, its threads, the versions and the commit are.
    """
    same = ("device", "threads", "mcibi_fast", "torch", "commit")
    for old in read(folder) if folder.is_dir() else []:
        rows, here, there = old["rows"], result["environment"], old["environment"]
        if (
            old["benchmark"] == result["benchmark"]
            and all(here[key] == there[key] for key in same)
            and all((row["backbone"], row["size"]) == (backbone, size) for row in rows)
            and 0 < len(rows) < len(METHODS)
        ):
            return old
    return result


def run(
    backbone: str, channels: int, size: int, device: str, budget: float, folder: Path
) -> Result:
    """Measures, prints and writes each row as soon as it is there; an interrupted run goes on."""
    if device == "cpu":
        keep_freed_memory()
    result = result_of("table15_methods", device, ("method", "backbone", "size"))
    result = begun(result, folder, backbone, size)
    where = result["environment"]
    print(
        f"Table 15 on {where['device']}, {where['threads']} threads: {backbone}, Z = "
        f"{channels}, K = {K}, {size} x {size}; training with {BATCH} images, inference of one"
    )
    rows = result["rows"]
    if rows:
        print(f"goes on after {len(rows)} of {len(METHODS)} methods")
    for row in measure(backbone, channels, size, device, budget, rows):
        rows.append(row)
        result["cases_left_out"] = len(METHODS) - len(rows)  # so far
        path = write(result, folder)
        seconds = ", ".join(f"{t} {row[f'{t}_ms'] / 1e3:.2f} s" for t in ("train", "inference"))
        print(f"{row['method']}: {seconds}", flush=True)
    shown = [{k: v for k, v in r.items() if k not in ("backbone", "size")} for r in rows]
    print(f"{table(shown, digits=2)}\n\nwrote {path} and .csv")
    return result


def main() -> int:
    parser = parser_of(__doc__.splitlines()[0], threads=1)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny backbone, narrow heads, small images"
    )
    parser.add_argument("--backbone", help="of timm (default: resnet101, as in the paper)")
    parser.add_argument("--size", type=int, help="side of the images (default: 256, on a GPU 512)")
    parser.add_argument("--budget", type=float, help="seconds per task (default: 60)")
    options = parsed(parser)
    if options.size is not None and (options.size < 16 or options.size % 16):
        parser.error(f"--size: must be a multiple of 16, got {options.size}")
    if options.device == "cpu" and options.threads == 1:
        count_processor_time()  # other programs on the machine then count less
    size = options.size or (64 if options.quick else 512 if options.device == "cuda" else 256)
    backbone = options.backbone or ("test_resnet" if options.quick else "resnet101")
    budget = options.budget or (1 if options.quick else 60)
    channels = 32 if options.quick else 512
    return exit_status(lambda: run(backbone, channels, size, options.device, budget, options.out))


if __name__ == "__main__":
    sys.exit(main())
