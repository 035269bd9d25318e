"""Speed of FCN + MCIBI++ on ResNet-50: ``python -m benchmarks.bench_model [--quick]``.

backbone   only the backbone, which both candidates have
released   the same model in the structure of the released code (`benchmarks.released_structure`)
ours       ``models.create("fcn_mcibipp")``, and ``inference.labels.predict_labels`` at inference

train      one step with K = 150: forward, losses, update of the memory and gradients of all
           parameters; without dropout, whose masks would differ, and without the optimizer
inference  from images to class indices at the images' size, with one and two stages (Eq. 17)

``host_syncs`` counts the calls that make the host wait for a GPU: on a GPU by the warnings of its
driver, on the CPU by the same calls of PyTorch (there ours also checks the labels at once, which on
a GPU is left to ``ops.check_labels``). On a GPU bfloat16 means autocast, and float32 does not use
TF32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_memory_update import label_map
from benchmarks.cases import Candidate, Case
from benchmarks.harness import command_line, nbytes, randn, run_cases, seeded
from benchmarks.host_syncs import count
from benchmarks.released_structure import ReleasedModel
from benchmarks.results import Result
from mcibi_fast import models
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models import Segmentor
from mcibi_fast.recipes import InferenceConfig

K, BACKBONE = 150, "resnet50"


def make_model(form: str, device: str, backbone: str) -> Segmentor:
    options = {"form": form, "noise": "released", "dropout": 0.0}
    model: Segmentor = seeded(models.create, "fcn_mcibipp", K, backbone, **options)
    model.memory.memory[:, 0] = randn(K, device="cpu")
    model.memory.memory[:, 1] = randn(K + 1, device="cpu")[1:].abs()
    return model.to(device)


def step(model: Segmentor, forward: Any, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss, memory and gradients of the head; the memory is reset, so that all steps are equal."""
    model.train()
    before = model.memory.memory.clone()
    loss = torch.stack(list(forward(images, labels).losses.values())).sum()
    # The gradients of biases before a batch norm or a softmax are only rounding errors.
    head = [p for p in model.head.parameters() if p.ndim > 1]
    grads = torch.autograd.grad(loss, [*head, *model.backbone.parameters()], allow_unused=True)
    after = model.memory.memory.clone()
    model.memory.memory.copy_(before)
    return [loss.detach(), after, *(g for g in grads[: len(head)] if g is not None)]


@torch.no_grad()
def infer_ours(model: Segmentor, images: Tensor, stages: int) -> list[Tensor]:
    """The logits of the last stage, and the class of every pixel."""
    kept = []
    with model.register_forward_hook(lambda _, __, output: kept.append(output.logits)):
        labels = predict_labels(
            model.eval(), images, images.shape[2:], InferenceConfig(stages=stages)
        )
    return [*kept, labels]


@torch.no_grad()
def infer_released(model: ReleasedModel, images: Tensor, stages: int) -> list[Tensor]:
    return list(model.eval().predict(images, stages))


def backbone_alone(model: Segmentor, images: Tensor, train: bool) -> list[Tensor]:
    model.train(train)
    with torch.set_grad_enabled(train):
        maps = model.backbone(images)
        if not train:
            return maps
        grads = [torch.ones_like(m) for m in maps[-2:]]  # what the heads read
        parameters = list(model.backbone.parameters())
        return list(torch.autograd.grad(maps[-2:], parameters, grads, allow_unused=True))


def case(
    task: str, stages: int, form: str, dtype: torch.dtype, device: str,
    *, size: int, batch: int = 1, backbone: str = BACKBONE,
) -> Case:  # fmt: skip
    model = make_model(form, device, backbone)
    theirs = ReleasedModel(model)
    images = randn(batch, 3, size, size, device=device)
    labels = label_map(K, size, device).expand(batch, -1, -1).contiguous()
    train = task == "train"
    runs: dict[str, Callable[[], Any]] = {
        "backbone": functools.partial(backbone_alone, model, images, train),
        "released": functools.partial(step, model, theirs.train(), images, labels)
        if train
        else functools.partial(infer_released, theirs, images, stages),
        "ours": functools.partial(step, model, model, images, labels)
        if train
        else functools.partial(infer_ours, model, images, stages),
    }
    truth = runs["released"]
    if dtype != torch.float32:
        runs = {name: torch.autocast(device, dtype)(run) for name, run in runs.items()}
    backbone_run, *candidates = [
        Candidate(name, run, counts=lambda run=run: {"host_syncs": count(run, device)})
        for name, run in runs.items()
    ]
    flops = convolution_flops(batch, size, backbone)
    return Case(
        "model",
        {
            "task": task,
            "stages": stages,
            "form": form,
            "backbone": backbone,
            "batch": batch,
            "size": size,
            "K": K,
        },
        dtype,
        candidates,
        parts=[backbone_run],
        bytes=(3 if train else 1) * (nbytes(images) + nbytes(*model.parameters())),
        flops=(3 if train else 1) * flops,
        # A ReLU's input near zero makes gradients differ; tests/benchmarks compares in float64.
        tolerance=1e-2 if train else None,
        euclidean=train,
        truth=None if dtype == torch.float32 else truth,
    )


@functools.cache
def convolution_flops(batch: int, size: int, backbone: str) -> int:
    """Operations of the convolutions in one pass: the backbone, R and F_T."""
    with torch.device("meta"):
        model = models.create("fcn", K, backbone, auxiliary_weight=0.0)
        images = torch.empty(batch, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        N = model.eval()(images).logits[:, 0].numel()
    return counter.get_total_flops() + 2 * N * 9 * 1024 * 512


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    size, batch = (512, 4) if device == "cuda" else (512, 1)
    if quick:
        size, batch = 128, 1
    dtypes = [torch.float32]
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        dtypes = [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        for form in ("released", "paper"):
            for task, stages in (("train", 1), ("inference", 1), ("inference", 2)):
                if form == "paper" and device == "cpu" and not quick and task == "train":
                    continue  # takes minutes, mostly for the backbone
                yield functools.partial(
                    case, task, stages, form, dtype, device, size=size, batch=batch
                )


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("model", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
