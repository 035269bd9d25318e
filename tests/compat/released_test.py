"""The released package's own test of a model, its `Tester`, on the CPU and in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PAIRS = [(15, 14), (17, 16), (19, 18)]
WIDTH = 8


def settings(
    *, within: str | None = None, pyramid: bool = False, align_corners: bool = False
) -> dict[str, Any]:
    """A small MCIBI++ of the package on a ResNet-18 for LIP's 20 classes.

    Args:
        within: the context within the image, "aspp" or "ppm"; None has none (FCN).
        pyramid: a feature pyramid (UperNet).
        align_corners: of every resizing.
    """
    joint = 2 * WIDTH if within else WIDTH
    head: dict[str, Any] = {
        "in_channels": 512, "feats_channels": WIDTH, "transform_channels": WIDTH // 2,
        "out_channels": WIDTH, "use_hard_aggregate": False, "downsample_before_sa": False,
        "context_within_image": {
            "is_on": within is not None, "type": within, "use_self_attention": within == "aspp",
            "cfg": {"pool_scales": [1, 2, 3, 6], "dilations": [1, 12, 24, 36]},
        },
        "decoder": {
            part: {"in_channels": WIDTH, "out_channels": WIDTH, "dropout": 0.1}
            for part in ("pr", "cwi", "cls")
        },
    }  # fmt: skip
    head["decoder"]["cls"]["in_channels"] = joint
    if pyramid:
        head["fpn"] = {
            "in_channels_list": [64, 128, 256, 512], "feats_channels": joint,
            "out_channels": WIDTH,
        }  # fmt: skip
        head["decoder"]["cls"] |= {
            "in_channels": 3 * WIDTH + joint, "kernel_size": 3, "padding": 1
        }  # fmt: skip
    return {
        "type": "MCIBIPlusPlus",
        "num_classes": 20,
        "align_corners": align_corners,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": {
            "type": "ResNet", "depth": 18, "structure_type": "resnet18conv3x3stem",
            "pretrained": False, "outstride": 8, "use_conv3x3_stem": True,
            "selected_indices": (0, 1, 2, 3),
        },
        "head": head,
        "auxiliary": None,
        "losses": {},
    }  # fmt: skip


def random_state(model: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights, statistics and a memory with which the predictions vary over an image."""
    from ssseg.modules import BuildSegmentor
    from ssseg.modules.utils import SSSegInputStructure

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BuildSegmentor(segmentor_cfg=copy.deepcopy(model), mode="TEST")
        state = network.state_dict()
        for name, value in state.items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("memory"):
                value.copy_(torch.rand(value.shape) + 0.5)
            elif "decoder" in name and value.ndim == 4:
                value.normal_(0, 3 / value[0].numel() ** 0.5)
            elif value.ndim == 4:
                value.normal_(0, 2**0.5 / value[0].numel() ** 0.5)
        network.eval()
        images = F.interpolate(torch.randn(4, 3, 9, 9), (61, 61), mode="bicubic")
        with torch.no_grad():
            for part in ("decoder_pr", "decoder_cwi", "decoder_cls"):
                if not hasattr(network, part):
                    continue
                decoder = getattr(network, part)
                seen: list[Tensor] = []
                hook = decoder.register_forward_hook(lambda _, __, out, to=seen: to.append(out))
                network(SSSegInputStructure(images=images, mode="TEST"))
                hook.remove()
                # Otherwise one class wins everywhere, with a probability of 1.
                scale = 2 / seen[0].std()
                decoder.conv2.bias.sub_(seen[0].mean((0, 2, 3))).mul_(scale)
                decoder.conv2.weight.mul_(scale)
    return state


class _Loader(torch.utils.data.DataLoader):
    """In order, one image at a time; the package's loader is for several processes."""

    def __init__(self, dataset: Any, dataloader_cfg: Any) -> None:
        super().__init__(dataset)
        self.sampler.set_epoch = lambda epoch: None  # type: ignore[attr-defined]


class _Module(nn.Module):
    """What stands for DistributedDataParallel."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        super().__init__()
        self.module = module


def released_labels(
    model: dict[str, Any],
    inference: dict[str, Any],
    pipelines: list[tuple[str, dict[str, Any]]],
    checkpoint: Path,
    root: Path,
    monkeypatch: Any,
) -> tuple[dict[str, NDArray[np.int32]], dict[str, Any]]:
    """The label maps that the package's `Tester` predicts for LIP's validation split, by name.

    Its loop, dataset, transforms, model and metrics are the package's. What it does with CUDA and
    several processes is replaced, and the model computes in float64.

    Args:
        model: see `settings`.
        inference: the package's settings of the test: "forward" and "tta".
        pipelines: how a test image is resized, before it is normalised.
        checkpoint: a file of weights.
        root: LIP's folder.
        monkeypatch: pytest's.

    Returns:
        The labels, and the package's scores.
    """
    from ssseg import test as package

    found: dict[str, NDArray[np.int32]] = {}
    scores: dict[str, Any] = {}

    def results(seg_results: Any, **_: Any) -> tuple[list[Any], list[Any], list[str]]:
        found.update({name: result["seg_pred"] for name, result in seg_results.items()})
        pairs = list(seg_results.values())
        return [p["seg_pred"] for p in pairs], [p["seg_gt"] for p in pairs], list(seg_results)

    config = copy.deepcopy(model) | {
        "inference": inference | {"evaluate": {"metric_list": ["iou", "miou"]}},
        "dataset": {
            "type": "LIPDataset",
            "rootdir": str(root),
            "train": {"data_pipelines": [("RandomFlip", {"fixed_seg_target_pairs": PAIRS})]},
            "test": {
                "set": "val",
                "data_pipelines": [
                    *pipelines, ("Normalize", {"mean": MEAN, "std": STD}), ("ToTensor", {}),
                ],
            },
        },
        "dataloader": {"test": {"batch_size_per_gpu": 1, "num_workers_per_gpu": 0}},
        "work_dir": str(root),
    }  # fmt: skip
    tester = package.Tester.__new__(package.Tester)
    tester.cfg = SimpleNamespace(SEGMENTOR_CFG=config)
    tester.cmd_args = SimpleNamespace(
        eval_env="local", ckptspath=str(checkpoint), local_rank=0, ema=False
    )
    tester.cfg_file_path = "tests"
    tester.logger_handle = SimpleNamespace(
        info=lambda said, **_: scores.update(said) if isinstance(said, dict) else None
    )
    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("RANK", "0")
        patch.setattr(package, "BuildDistributedDataloader", _Loader)
        patch.setattr(package, "BuildDistributedModel", _Module)
        patch.setattr(package, "postprocesspredgtpairs", results)
        patch.setattr(package, "ismainprocess", lambda: True)
        patch.setattr(torch.distributed, "barrier", lambda: None)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(nn.Module, "cuda", lambda module, device: module.double())
        tester.start()
    return found, scores
