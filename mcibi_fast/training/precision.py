"""In which precision a training computes, and PyTorch's switches for speed on a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mcibi_fast import models
from mcibi_fast.inference.precision import autocast
from mcibi_fast.models.weights import Precision
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.parts import SpeedConfig

WORTH = 1.1  # mixed precision is chosen if it is faster by more than this factor
CLASSES = 21  # of the model that is timed; the number hardly matters


def with_precision(
    config: TrainConfig, report: Callable[[str], None] = lambda line: None
) -> TrainConfig:
    """The configuration with a definite ``mixed_precision`` in place of "auto" or "measured".

    Global random generators are left as they were.

    Args:
        config: the run's configuration.
        report: takes a line that says what was chosen and why (on the main process).
    """
    if config.mixed_precision not in ("auto", "measured"):
        return config
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    chosen: Precision
    if not _has_bf16(cpu):
        chosen, why = "no", f"this {'processor' if cpu else 'GPU'} does not compute in bf16"
    elif config.mixed_precision == "measured":
        chosen, why = _faster(config, cpu)
    else:
        chosen, why = ("no", "") if cpu else ("bf16", "this GPU computes in it")
    # A CPU's default is not worth a line.
    if os.environ.get("RANK", "0") == "0" and (config.mixed_precision == "measured" or not cpu):
        report(f"mixed precision {chosen}: {why}")
    return replace(config, mixed_precision=chosen)


def _has_bf16(cpu: bool) -> bool:
    if not cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bf16 is emulated, which takes longer than float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _faster(config: TrainConfig, cpu: bool) -> tuple[Precision, str]:
    """What the main process measured to be faster, and its times in words."""
    state = PartialState(cpu=cpu)
    seconds: list[dict[Precision, float]] = [{}]
    if state.is_main_process:
        seconds = [step_seconds(config, state.device, state.num_processes)]
    broadcast_object_list(seconds)
    plain, mixed = seconds[0]["no"], seconds[0]["bf16"]
    chosen: Precision = "bf16" if plain > WORTH * mixed else "no"
    return chosen, f"a step takes {mixed:.2f} s in bf16 and {plain:.2f} s in float32"


def step_seconds(
    config: TrainConfig, device: torch.device, processes: int = 1
) -> dict[Precision, float]:
    """The time of a step's forward and backward pass in full precision and in bf16.

    The model has fresh weights, the images are noise; the better of two steps counts, after one to
    warm up.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        options = config.model.arguments() | {"pretrained": False}
        model = models.create(config.model.name, CLASSES, config.model.backbone, **options)
        model.to(device).train()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        count = max(1, config.batch_size // (config.accumulate * processes))
        height, width = config.augmentation.crop_size
        frames = (config.model.history + 1,) if config.model.history else ()
        images = torch.randn(count, *frames, 3, height, width, device=device)
        labels = torch.randint(0, CLASSES, (count, height, width), device=device)
        precisions: tuple[Precision, ...] = ("no", "bf16")
        best = dict.fromkeys(precisions, float("inf"))
        for repetition in range(3):
            for precision in precisions:
                start = time.perf_counter()
                with autocast(device, precision):
                    losses = model(images, labels).losses
                torch.stack(list(losses.values())).sum().backward()
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                seconds = time.perf_counter() - start
                if repetition:
                    best[precision] = min(best[precision], seconds)
        return best


@contextmanager
def fast_kernels(speed: SpeedConfig, device: torch.device) -> Iterator[None]:
    """TF32 and cuDNN's own choice of algorithms on a GPU; afterwards all is as it was."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if speed.tf32 else "highest")
            cudnn.allow_tf32 = speed.tf32
            cudnn.benchmark = speed.cudnn_benchmark
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, cudnn.allow_tf32 = before
