"""Other libraries' models before and after `accelerate`: ``mcibi-fast bench dropin``.

The models of `MODELS` are built from their configurations, with random weights; the image is
512x512. A case is a library, a model, the number of classes K and a task:

train       the loss as the library computes it and the gradients of all weights, batch
            normalisation and dropout as in evaluation
inference   from the image to the class of every pixel, by the library's own way to it

library     the library's model
ours        the same, accelerated by ``compat.<library>.accelerate``

Before a case is timed, the loss, the gradients and the classes of both are compared; the column
"difference" is the largest difference divided by the largest value, and for classes the share that
differs. The allocator is glibc's as it is, since that is what others' programs have: it returns
large results to the system, so their pages are new in every step. A library that is not installed
is left out, and named. All cases take hours on a slow
machine: ``--resume`` writes each as it comes and continues where it was stopped, ``--only
"transformers UperNet 150"`` selects some.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case
from benchmarks.harness import Later, command_line, nbytes, randn, run_cases, seeded
from benchmarks.results import Result

IGNORED = 255


class Task(NamedTuple):
    """How a library's model computes its loss and its classes."""

    model: Any
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    classes: Callable[[Any, Tensor], Tensor]


def transformers_model(kind: str, K: int, size: int) -> Task:
    import transformers

    configuration = getattr(transformers, f"{kind}Config")(
        num_labels=K, **transformers_options(kind, size)
    )
    model = seeded(getattr(transformers, f"{kind}ForSemanticSegmentation"), configuration)
    own = "Segformer" if kind == "UperNet" else kind
    processor = getattr(transformers, f"{own}ImageProcessor")()

    def classes(model: Any, x: Tensor) -> Tensor:
        # The image processor belongs to what is accelerated.
        post = model.processor.post_process_semantic_segmentation
        return post(model(pixel_values=x), target_sizes=[(size, size)] * len(x))[0]

    object.__setattr__(model, "processor", processor)
    return Task(model, lambda m, x, y: m(pixel_values=x, labels=y).loss, classes)


def transformers_options(kind: str, size: int) -> dict[str, Any]:
    """What differs from the defaults of the configuration: small backbones, the size of images."""
    import transformers

    transformer = {
        "image_size": size,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    }
    if kind == "UperNet":
        stages = ["stage1", "stage2", "stage3", "stage4"]
        backbone = transformers.ResNetConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            layer_type="basic",
            out_features=stages,
        )
        return {"backbone_config": backbone, "hidden_size": 128, "auxiliary_in_channels": 256}
    if kind == "DPT":
        sizes = {"neck_hidden_sizes": [48, 96, 192, 192], "fusion_hidden_size": 64}
        return transformer | sizes | {"is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3]}
    if kind == "Beit":
        return transformer | {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 64}
    return {"image_size": size} if kind == "MobileViT" else {}


def mask_model(kind: str, K: int, size: int) -> Task:
    """MaskFormer's and Mask2Former's post-processing alone, of 100 masks at a quarter of the size.

    The model is left alone: its losses are of masks.
    """
    import transformers

    model = nn.Module()
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    object.__setattr__(model, "processor", processor)
    outputs = transformers.utils.ModelOutput(
        class_queries_logits=randn(1, 100, K + 1, device="cpu"),
        masks_queries_logits=randn(1, 100, size // 4, size // 4, device="cpu"),
    )

    def classes(model: Any, x: Tensor) -> Tensor:
        post = model.processor.post_process_semantic_segmentation
        return post(outputs, target_sizes=[(size, size)])[0]

    return Task(model, lambda m, x, y: x.sum(), classes)


def smp_model(kind: str, K: int, size: int) -> Task:
    import segmentation_models_pytorch as smp

    model = seeded(getattr(smp, kind), "resnet18", encoder_weights=None, classes=K)
    return Task(
        model,
        lambda m, x, y: F.cross_entropy(m(x), y, ignore_index=IGNORED),
        lambda m, x: m(x).argmax(1),
    )


def torchvision_model(kind: str, K: int, size: int) -> Task:
    from torchvision.models import segmentation

    model = seeded(getattr(segmentation, kind), weights_backbone=None, num_classes=K)
    return Task(
        model,
        lambda m, x, y: F.cross_entropy(m(x)["out"], y, ignore_index=IGNORED),
        lambda m, x: m(x)["out"].argmax(1),
    )


def mmseg_model(kind: str, K: int, size: int) -> Task:
    import mmseg.models
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    norm = {"type": "BN", "requires_grad": True}
    head = {
        "type": kind,
        "in_channels": 512,
        "in_index": 3,
        "channels": 128,
        "num_classes": K,
        "norm_cfg": norm,
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss"},
    }
    if kind == "UPerHead":
        head |= {"in_channels": [64, 128, 256, 512], "in_index": [0, 1, 2, 3]}
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor"},
        "backbone": {
            "type": "ResNetV1c",
            "depth": 18,
            "strides": (1, 2, 1, 1),
            "dilations": (1, 1, 2, 4),
            "norm_cfg": norm,
        },
        "decode_head": head,
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = seeded(mmseg.registry.MODELS.build, ConfigDict(config))

    def samples(y: Tensor) -> list[Any]:
        shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (size, size))
        found = [SegDataSample(metainfo=shapes) for _ in y]
        for sample, each in zip(found, y, strict=True):
            sample.gt_sem_seg = PixelData(data=each[None])
        return found

    return Task(
        model,
        lambda m, x, y: m(x, samples(y), mode="loss")["decode.loss_ce"],
        lambda m, x: m(x, samples(x[:, 0]), mode="predict")[0].pred_sem_seg.data,
    )


_TRAINED = ("train", "inference")
MODELS: tuple[tuple[str, str, tuple[str, ...], Callable[[str, int, int], Task], Any], ...] = (
    (
        "transformers",
        "transformers",
        ("Segformer", "UperNet", "MobileViT", "DPT", "Beit"),
        transformers_model,
        _TRAINED,
    ),
    ("transformers", "transformers", ("Mask2Former", "MaskFormer"), mask_model, ("inference",)),
    (
        "smp",
        "segmentation_models_pytorch",
        ("FPN", "DeepLabV3Plus", "PSPNet", "UPerNet"),
        smp_model,
        _TRAINED,
    ),
    (
        "torchvision",
        "torchvision",
        ("lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"),
        torchvision_model,
        _TRAINED,
    ),
    ("mmseg", "mmseg", ("FCNHead", "UPerHead"), mmseg_model, _TRAINED),
)


def accelerated(library: str, model: nn.Module) -> nn.Module:
    """A copy that is accelerated, and its image processor if it has one."""
    own = importlib.import_module(f"mcibi_fast.compat.{library}")
    fast = copy.deepcopy(model)
    if list(model.parameters()):
        own.accelerate(fast)
    if hasattr(model, "processor"):
        object.__setattr__(fast, "processor", own.accelerate(copy.deepcopy(model.processor)))
    return fast


def train(task: Task, x: Tensor, y: Tensor, model: Any) -> list[Tensor]:
    loss = task.loss(model, x, y)
    # Gradients of some biases are zero up to rounding (a softmax or a batch norm cancels them).
    used = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    gradients = torch.autograd.grad(loss, used, allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def infer(task: Task, x: Tensor, _y: Tensor, model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [task.classes(model, x)]


class Kept:
    """A function that keeps its last result, so that it need not run again to be compared."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        self.run = run
        self.result: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        self.result = []  # freed before, so that the peak of memory is that of one run
        self.result = self.run()
        return self.result


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of the results, as the module's docstring has it."""
    largest = 0.0
    for a, b in zip(after, before, strict=True):
        if not b.is_floating_point():
            return float((a != b).double().mean())
        largest = max(largest, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return largest


def case(
    library: str, kind: str, make: Callable[[str, int, int], Task],
    K: int, size: int, direction: str, device: str,
) -> Case:  # fmt: skip
    task = make(kind, K, size)
    slow = task.model.to(device).eval()
    fast = accelerated(library, slow)
    x = randn(1, 3, size, size, device=device)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, K, (1, size // 8, size // 8), generator=generator)
    y = y.repeat_interleave(8, 1).repeat_interleave(8, 2).to(device)
    y[:, :8] = IGNORED
    run = train if direction == "train" else infer
    before, after = (Kept(functools.partial(run, task, x, y, model)) for model in (slow, fast))
    return Case(
        "dropin",
        sizes_of(library, kind, K, size, direction),
        torch.float32,
        [
            Candidate("library", before),
            Candidate(
                "ours",
                after,
                counts=lambda: {"difference": difference(before.result, after.result)},
            ),
        ],
        bytes=nbytes(x, *slow.parameters()),
        flops=0,  # not counted: the model's, which are the same in both
        tolerance=1e-3,
        euclidean=True,
    )


def sizes_of(library: str, kind: str, K: int, size: int, direction: str) -> dict[str, Any]:
    return {"library": library, "model": kind, "K": K, "size": size, "task": direction}


def cases(device: str, quick: bool) -> Iterator[Later]:
    size = 64 if quick else 512
    for K in (19,) if quick else (150, 19):
        for library, package, kinds, make, directions in MODELS:
            if importlib.util.find_spec(package) is None:
                print(f"{library}: left out, {package} is not installed")
                continue
            for kind in kinds[:2] if quick else kinds:
                for direction in directions:
                    sizes = library, kind, K, size, direction
                    made = functools.partial(
                        case, library, kind, make, K, size, direction, device
                    )  # fmt: skip
                    yield Later(sizes_of(*sizes), made)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        return [run_cases("dropin", cases(device, quick), device, quick, keep_memory=False)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
