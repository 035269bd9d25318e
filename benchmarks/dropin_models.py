"""Other libraries' models for `bench_dropin`, from their configurations and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import randn, seeded

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


def released_model(kind: str, K: int, size: int) -> Task:
    """The authors' own, of a ResNet-18: their losses and their upsampling before the classes."""
    from ssseg.modules.models.segmentors.builder import BuildSegmentor
    from ssseg.modules.utils import SSSegInputStructure

    loss = {"type": "CrossEntropyLoss", "ignore_index": -100, "reduction": "mean"}
    head = {
        "in_channels": 512,
        "feats_channels": 512,
        "transform_channels": 256,
        "out_channels": 512,
        "context_within_image": {"is_on": False},
        "warmup_epoch": 0,
        "use_hard_aggregate": False,
        "downsample_before_sa": False,
        "force_use_preds_pr": False,
        "fuse_memory_cwi_before_fpn": True,
        # A momentum of 0 leaves the memory as it is, so that every run computes the same.
        "update_cfg": {
            "ignore_index": -100,
            "momentum_cfg": {
                "base_momentum": 0.0,
                "base_lr": None,
                "adjust_by_learning_rate": False,
            },
        },
        "decoder": {
            name: {"in_channels": 512, "out_channels": 512, "dropout": 0.1} | shape
            for name, shape in {
                "pr": {"kernel_size": 1, "padding": 0},
                "cls": {"kernel_size": 3, "padding": 1},
            }.items()
        },
    }
    config = {
        "type": kind,
        "num_classes": K,
        "align_corners": False,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": {
            "type": "ResNet",
            "structure_type": "random",
            "pretrained": False,
            "depth": 18,
            "outstride": 8,
        },
        "head": head,
        "auxiliary": None,
        "losses": {"loss_pr": loss | {"scale_factor": 0.4}, "loss_cls": loss | {"scale_factor": 1}},
    }
    model = seeded(BuildSegmentor, config, mode="TRAIN")

    def training(m: Any, x: Tensor, y: Tensor) -> Tensor:
        y = y.masked_fill(y == IGNORED, -100)
        step = SSSegInputStructure(images=x, mode="TRAIN", seg_targets=y)
        m.mode = "TRAIN"  # eval() sets it, too, and then there is no loss
        with torch.random.fork_rng(devices=[]):  # it seeds the global generator
            return m(step, learning_rate=0.01, epoch=1).loss

    def classes(m: Any, x: Tensor) -> Tensor:
        m.mode = "TEST"
        with torch.random.fork_rng(devices=[]):
            logits = m(SSSegInputStructure(images=x, mode="TEST")).seg_logits
        return F.interpolate(logits, x.shape[2:], mode="bilinear").argmax(1)

    return Task(model, training, classes)


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
    ("sssegmentation", "ssseg", ("MCIBIPlusPlus",), released_model, _TRAINED),
)
