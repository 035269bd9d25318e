"""Where the time of a training step and of an inference goes: ``python -m benchmarks.bench_step``.

backbone   the backbone
ours       the dataset-level context (H_pr, aggregation, attention, F_T) and the memory's update
head       everything else between the backbone and the logits
loss       the losses; at inference the class of every pixel (upsampling and argmax)
optimizer  SGD with momentum
loader     one worker that decodes, scales, crops and normalises the images of the batch

Of a step each column has forward and backward. Times are processor time of one thread, so other
programs on the machine count less; a column is of the faster of two steps. The backward pass is
attributed by the autograd nodes: each belongs to the part whose forward made it. bf16 is measured
where the processor multiplies it.
"""

from __future__ import annotations

import bisect
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.harness import command_line, seeded
from benchmarks.machine import keep_freed_memory
from benchmarks.results import Result, Row, result_of, table
from mcibi_fast import models
from mcibi_fast.data.loading import training_loader
from mcibi_fast.inference.precision import autocast
from mcibi_fast.models import Segmentor, memory_head, plain_head
from mcibi_fast.models.weights import Precision
from mcibi_fast.ops.measured import multiplies
from mcibi_fast.recipes import AugmentationConfig, FolderData

K, SIZE = 11, 288
FRAMEWORKS = ("fcn", "pspnet", "upernet", "deeplabv3", "isnet")  # the paper's
BACKBONES = {"tf_efficientnet_lite0": 8, "resnet50": 2}  # and the batch of each
PARTS = ("backbone", "head", "ours", "loss", "optimizer")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS: tuple[tuple[str, Precision], ...] = (
    ("contiguous", "no"),
    ("channels_last", "no"),
    ("channels_last", "bf16"),
)


class Stopwatch:
    """Processor time by parts, of the forward and of the backward pass."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._last = 0.0
        # From which sequence number on autograd's nodes belong to which part.
        self._numbers: list[int] = []
        self._owners: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this part, unless it is inside a further one."""
        self._switch([*self._open, name])
        try:
            yield
        finally:
            self._switch(self._open[:-1])

    def inside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*args, **options)

        return timed

    def backward(self, loss: Tensor) -> None:
        """The backward pass."""
        for node in _nodes(loss.grad_fn):
            number = node._sequence_nr()
            # The nodes that add to a parameter's gradient have no number of their own.
            if number < 1 << 62:
                owner = self.owner(number)
                node.register_prehook(lambda _, owner=owner: self._switch([owner]))
        self._switch(["loss"])
        loss.backward()
        self._switch([])

    def owner(self, number: int) -> str:
        """The part whose forward pass made the autograd node of this sequence number."""
        return self._owners[bisect.bisect_right(self._numbers, number) - 1]

    def _switch(self, parts: list[str]) -> None:
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._open, self._last = parts, now
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(parts[-1] if parts else "head")


def _nodes(root: Any) -> list[Any]:
    found, queue = {}, [root]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found[node] = None
            queue += [following for following, _ in node.next_functions]
    return list(found)


@contextmanager
def watched(model: Segmentor) -> Iterator[Stopwatch]:
    """A stopwatch of the model's parts."""
    watch, head = Stopwatch(), model.head
    places: list[tuple[str, Any, str]] = [
        ("backbone", model.backbone, "forward"),
        ("head", head, "forward"),
        ("loss", head, "class_map"),
        ("loss", memory_head, "joint_losses"),
        ("loss", plain_head, "joint_losses"),
    ]
    if head.has_memory:
        context = head.context
        places += [("ours", context, name) for name in ("prepare", "gather")]
        places += [("ours", context.weight_head, "forward"), ("ours", head.memory, "update")]
    with ExitStack() as stack:
        for part, owner, name in places:
            inside = watch.inside(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, inside))
        yield watch


def step(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: Precision,
) -> dict[str, float]:
    """The times of a training step."""
    model.train()
    with watched(model) as watch:
        with autocast(images.device, precision):
            losses = model(images, labels).losses
        watch.backward(torch.stack(list(losses.values())).sum())
        with watch.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return watch.seconds


@torch.no_grad()
def infer(model: Segmentor, images: Tensor, precision: Precision) -> dict[str, float]:
    """The times from images to class maps."""
    model.eval()
    with watched(model) as watch, autocast(images.device, precision):
        model.head.class_map(model(images).logits, images.shape[2:])
    return watch.seconds


def measure(
    framework: str,
    memory: str | None,
    backbone: str,
    *,
    batch: int,
    size: int = SIZE,
    variants: Sequence[tuple[str, Precision]] = VARIANTS,
) -> list[Row]:
    """A row for each task and variant, in milliseconds; the variants take turns."""
    model: Segmentor = seeded(
        models.create, framework, K, backbone, memory=memory, output_stride=16
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(0, K, (batch, size // 16, size // 16), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    best: dict[tuple[str, str, Precision], dict[str, float]] = {}
    for _ in range(2):  # the faster one counts
        for layout, precision in variants:
            arrange(model, optimizer, layout)
            own = images.contiguous(memory_format=FORMATS[layout])
            times = {
                "train": step(model, optimizer, own, labels, precision),
                "inference": infer(model, own, precision),
            }
            for task, seconds in times.items():
                key = task, layout, precision
                known = best.get(key)
                better = known is None or sum(seconds.values()) < sum(known.values())
                best[key] = seconds if better else known  # type: ignore[assignment]
    return [
        {
            "framework": framework,
            "memory": memory or "none",
            "backbone": backbone,
            "batch": batch,
            "size": size,
            "task": task,
            "layout": layout,
            "precision": precision,
            **{f"{part}_ms": 1e3 * seconds[part] for part in PARTS},
            "total_ms": 1e3 * sum(seconds.values()),
        }
        for (task, layout, precision), seconds in best.items()
    ]


def arrange(model: nn.Module, optimizer: torch.optim.Optimizer, layout: str) -> None:
    """Puts the convolutions' weights, and the optimizer's momentum of them, into a layout."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            own = module.weight
            own.data = own.data.contiguous(memory_format=FORMATS[layout])
            for name, state in optimizer.state[own].items():
                if isinstance(state, Tensor):
                    optimizer.state[own][name] = state.contiguous(memory_format=FORMATS[layout])


def loader_ms(batch: int, size: int = SIZE, images: int = 16) -> float:
    """The time in which one worker makes a batch of crops of 480x360 pictures, as of CamVid."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(images):
            smooth = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            mask = Image.fromarray(generator.integers(0, K, (24, 32), dtype=np.uint8))
            for kind, picture, way in (("images", smooth, Image.Resampling.BICUBIC),
                                       ("labels", mask, Image.Resampling.NEAREST)):  # fmt: skip
                path = Path(folder, kind, "train", f"{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.resize((480, 360), way).save(path)
        data = FolderData(root=folder, classes=[str(k) for k in range(K)]).dataset("train")
        data.transform = AugmentationConfig(crop_size=(size, size)).transform(data, seed=0)
        times = []
        for epoch in range(3):
            start, count = time.thread_time(), 0
            for _ in training_loader(data, batch_size=1, seed=0, epoch=epoch, workers=0):
                count += 1
            times.append((time.thread_time() - start) / count)
    return 1e3 * batch * min(times)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """None: there is nothing to compare with, so pytest-benchmark has nothing to run."""
    yield from ()


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """One result; ``quick`` takes a small backbone and small images."""
    if device != "cpu":
        raise SystemExit("bench_step: measures processor time, so it needs --device cpu")
    keep_freed_memory()
    backbones = {"test_resnet": 2} if quick else BACKBONES
    size = 64 if quick else SIZE
    variants = [v for v in VARIANTS if v[1] == "no" or multiplies(torch.bfloat16)]
    keys = ["framework", "memory", "backbone", "batch", "size", "task", "layout", "precision"]
    result = result_of("step", device, keys)
    for backbone, batch in backbones.items():
        loader = loader_ms(batch, size)
        for framework in FRAMEWORKS:
            for memory in (None, "mcibipp"):
                rows = measure(
                    framework, memory, backbone, batch=batch, size=size, variants=variants
                )
                for row in rows:
                    row["loader_ms"] = loader if row["task"] == "train" else None
                result["rows"] += rows
                shown = [
                    {k: v for k, v in row.items() if k not in ("size", "batch")} for row in rows
                ]
                print(f"\n{table(shown, digits=0)}", flush=True)
    return [result]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
