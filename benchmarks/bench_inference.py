"""Speed of inference, side by side: ``mcibi-fast bench inference --threads 1 [--quick]``.

A run goes from an image to class indices of its size (`inference.labels.predict_labels`).

eager          the model with convolutions in the usual layout, (channels, height, width)
channels_last  as ``models.create`` makes it: with the channels of a pixel side by side in memory
folded         eager after ``fold()``: batch norms and class representations are in the weights (of
               a model without a memory, batch norms)
onnxruntime    what ``mcibi-fast export`` writes, in onnxruntime
openvino       the same file in OpenVINO, if that is installed
compile        folded, channels_last, and ``torch.compile`` of the model
bf16           folded, channels_last, under bfloat16 autocast; its labels need not be the same
ours           folded and channels_last, as ``predict``, ``evaluate`` and ``video`` run it

``differing`` is the share of pixels whose label is not that of eager. If one in a thousand differs,
of any but bf16, nothing is timed. The weights are random; batch norms and memory have seen images.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case
from benchmarks.harness import command_line, randn, run_cases, seeded
from benchmarks.results import Result, table
from mcibi_fast import models
from mcibi_fast.inference import export
from mcibi_fast.inference.folding import folded
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import ModelSpec

FRAMEWORKS = ("fcn", "fcn_mcibipp", "upernet_mcibipp")
BACKBONES = ("tf_efficientnet_lite0", "resnet50")
SIZES = ((11, (360, 480)), (150, (512, 512)))
SHOWN = ("framework", "backbone", "K", "image", "candidate", "images_per_s", "differing")
Predict = Callable[[], Tensor]


def make_model(framework: str, backbone: str, num_classes: int) -> Segmentor:
    """A model whose batch norms and memory have seen images."""
    model: Segmentor = seeded(models.create, framework, num_classes, backbone)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean of what it has seen
    blocks = randn(4, 1, 8, 8, device="cpu").argsort(0)[:2, 0] * 37 % num_classes
    labels = F.interpolate(blocks[:, None].float(), (128, 128))[:, 0].long()
    with torch.no_grad():
        model.train()(picture(2, (128, 128)), labels)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


def picture(batch: int, size: tuple[int, int]) -> Tensor:
    """Smooth colours with some noise, of deviation 1 or so."""
    smooth = F.interpolate(
        randn(batch, 3, 12, 16, device="cpu"), size, mode="bicubic", align_corners=False
    )
    return smooth + 0.1 * randn(batch, 3, *size, device="cpu")


def with_torch(model: Segmentor, images: Tensor, dtype: torch.dtype | None = None) -> Predict:
    @torch.no_grad()
    def run() -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return predict_labels(model, images, images.shape[2:])

    return run


def with_compile(model: Segmentor, images: Tensor) -> Predict:
    compiled = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def run() -> Tensor:
        return model.head.class_map(compiled(images).logits, images.shape[2:])

    return run


def onnx_content(model: Segmentor, num_classes: int, size: tuple[int, int]) -> bytes:
    spec = ModelSpec(
        name="fcn",
        backbone="resnet50",
        options={},
        classes=[str(i) for i in range(num_classes)],
        palette=[[0, 0, 0]] * num_classes,
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    program = export.trace(export.EvaluationForm(model), size, standard=True)
    return export.onnx_bytes(program, spec)


def with_onnxruntime(content: bytes, images: Tensor) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(["labels"], {"images": images.numpy()})[0])


def with_openvino(content: bytes, images: Tensor) -> Predict:
    import openvino

    core = openvino.Core()
    network = core.read_model(content)
    network.reshape(list(images.shape))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(network, "CPU", settings)
    return lambda: torch.from_numpy(compiled([images.numpy()])["labels"])


def case(
    framework: str, backbone: str, num_classes: int, size: tuple[int, int], *, packages: bool = True
) -> Case:
    """
    Args:
        framework, backbone, num_classes: the model.
        size: (height, width) of the image.
        packages: also time torch.compile and the runtimes, which take a minute to prepare.
    """
    model = make_model(framework, backbone, num_classes)
    images = picture(1, size)
    last = folded(model)
    runs = {
        "eager": with_torch(_contiguous(model), images),
        "channels_last": with_torch(model, images),
        "folded": with_torch(_contiguous(last), images),
    }
    if packages:
        content = onnx_content(model, num_classes, size)
        for name, make in (("onnxruntime", with_onnxruntime), ("openvino", with_openvino)):
            try:
                runs[name] = make(content, images)
            except ImportError as error:
                print(f"{name} is left out: {error}")
        runs["compile"] = with_compile(last, images)
    runs["ours"] = with_torch(last, images)
    parts = {"bf16": with_torch(last, images, torch.bfloat16)} if _has_bf16() else {}
    expected = runs["eager"]()

    def differing(run: Predict) -> dict[str, Any]:
        return {"differing": float((run() != expected).double().mean())}

    def candidates(runs: dict[str, Predict]) -> list[Candidate]:
        return [Candidate(k, r, counts=functools.partial(differing, r)) for k, r in runs.items()]

    return Case(
        "inference",
        {
            "framework": framework,
            "backbone": backbone,
            "K": num_classes,
            "image": "x".join(map(str, reversed(size))),
        },
        torch.float32,
        candidates(runs),
        parts=candidates(parts),
        bytes=4 * images.numel() + 8 * expected.numel(),
        flops=0,
    )


def _contiguous(model: Segmentor) -> Segmentor:
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def _has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    if device != "cpu":
        return
    if quick:
        for framework in FRAMEWORKS[:2]:
            yield functools.partial(case, framework, BACKBONES[0], 11, (128, 160), packages=False)
        return
    for backbone in BACKBONES:
        for num_classes, size in SIZES:
            for framework in FRAMEWORKS:
                yield functools.partial(case, framework, backbone, num_classes, size)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``, with images a second."""
    result = run_cases("inference", cases("cpu", quick), "cpu", quick)
    for row in result["rows"]:
        row["images_per_s"] = 1e3 / row["fastest_ms"]
    print(table([{k: row[k] for k in SHOWN} for row in result["rows"]], 4))
    return [result]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
