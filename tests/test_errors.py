"""Errors of PyTorch, NumPy and the system become one line that says what to do."""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from mcibi_fast import cli
from mcibi_fast.data.loading import evaluation_loader, training_loader
from mcibi_fast.errors import (
    TooLittleMemoryError,
    TrainingError,
    enough_memory,
    explanation,
    is_out_of_memory,
)
from mcibi_fast.models import SegmentationHead
from mcibi_fast.recipes import ScenesData, TrainConfig
from tests.security.forked import bounded

Fails = Callable[..., str]
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 40 bytes."
)
KILLED = "DataLoader worker (pid 31) is killed by signal: Killed. "


def raised(function: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


ALLOCATIONS = {
    "PyTorch": lambda: torch.empty(2**60, dtype=torch.uint8),
    "NumPy": lambda: np.empty(2**60, np.uint8),
    "Python": lambda: bytearray(2**60),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_failed_allocations_are_known(allocate: Callable[[], object]) -> None:
    error = raised(allocate)
    assert is_out_of_memory(error)
    with (
        pytest.raises(
            TooLittleMemoryError, match=r"a.png: not enough memory.*; take less"
        ) as found,
        enough_memory("a.png", "take less"),
    ):
        raise error
    assert "\n" not in str(found.value) and len(str(found.value)) < 300
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)
    with pytest.raises(TooLittleMemoryError, match=r"^a.png"), enough_memory("b", "b"):
        raise found.value  # the first that knew keeps the word


def test_what_else_is_a_failed_allocation() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    for other in (
        RuntimeError("size mismatch"),
        ValueError("out of memory.png: cannot be decoded"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ):
        assert not is_out_of_memory(other) and explanation(other) is None
        with pytest.raises(type(other)), enough_memory("a", "b"):
            raise other


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: not enough memory; use smaller batches, crops or windows"),
        (
            RuntimeError(ALLOCATOR),
            "error: not enough memory (tried to allocate 40 bytes); use smaller batches",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory (CUDA out of memory.)"),
        (RuntimeError(KILLED), "a process that loads data ended early"),
        (RuntimeError(KILLED), "use fewer processes (--workers; --set workers=N in training)"),
        (RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), "(pid(s) 3, 4)"),
        (TooLittleMemoryError("a.png: not enough memory"), "error: a.png: not enough memory\n"),
    ],
)
def test_no_command_ends_in_a_traceback(
    error: Exception, message: str, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcibi_fast.commands import info

    def run(args: object) -> None:
        raise error

    monkeypatch.setattr(info, "run", run)
    assert message in fails("info")
    monkeypatch.setenv("MCIBI_FAST_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["info"])


class Failing(nn.Module):
    """A model whose pass fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.head, self.needs_labels, self.error = SegmentationHead(), False, error
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> None:
        raise self.error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATOR)], ids=["numpy", "torch"])
def test_the_image_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcibi_fast.inference.evaluate import evaluate
    from mcibi_fast.inference.predict import predict
    from mcibi_fast.inference.predict_video import predict_video
    from tests.inference.test_predict import SPEC

    model: object = Failing(error)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "in" / "photo.png")
    out = tmp_path / "out"
    with pytest.raises(TooLittleMemoryError, match=r"photo.png: 48x32 pixels: not eno.*--window"):
        predict(model, SPEC, tmp_path / "in", out)  # type: ignore[arg-type]
    with pytest.raises(TooLittleMemoryError, match=r"photo: 48x32 pixels: not enough.*--window"):
        predict_video(model, SPEC, str(tmp_path / "in"), out, overlay=False)  # type: ignore[arg-type]
    monkeypatch.setattr(Image.Image, "load", lambda picture: np.empty(2**60, np.uint8))
    with pytest.raises(TooLittleMemoryError, match=r"photo.png: not enough memory"):
        predict(model, SPEC, tmp_path / "in", out)  # type: ignore[arg-type]
    dataset = ScenesData(val_count=2, size=(32, 48)).dataset("val")
    name = dataset.name(0)
    with pytest.raises(TooLittleMemoryError, match=rf"{name}: 1x3x32x48: not enou.*--batch-size"):
        evaluate(model, dataset)  # type: ignore[arg-type]


def test_training_names_its_settings(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcibi_fast.training import trainer
    from mcibi_fast.training.train import train

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr(trainer, "accumulate_gradients", fail)
    message = r"smaller batch_size \(4\), a larger accumulate \(1\).*crop_size \(32x32\)"
    with pytest.raises(TooLittleMemoryError, match=message):
        train(tiny_config(), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("framework", "settings", "expected"),
    [
        ("pspnet", ("batch_size=2", "accumulate=2"), "pspnet has pyramid pooling to 1x1"),
        ("upernet", ("batch_size=1",), "upernet has pyramid pooling to 1x1"),
        ("deeplabv3", ("batch_size=1",), "deeplabv3 has ASPP's image pooling"),
        (
            "fcn",
            ("batch_size=1", "augmentation.crop_size=[8,8]"),
            "the crops of 8x8 are small; use a larger batch_size, a smaller accumulate, or a "
            "larger augmentation.crop_size",
        ),
    ],
)
def test_batch_norm_of_one_value(
    framework: str,
    settings: tuple[str, ...],
    expected: str,
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    own_generator: None,
) -> None:
    from mcibi_fast.training.train import train

    config = tiny_config(*settings, "epochs=1")
    config.model.framework = framework
    with pytest.raises(TrainingError) as caught:
        train(config, tmp_path / "run", progress=False)
    text = str(caught.value)
    assert expected in text and "\n" not in text
    assert f"batch_size={config.batch_size} with accumulate={config.accumulate}" in text


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [
        ("nowhere", "there is no file nowhere with weights; expected a file or a run"),
        ("true", "timm/test_resnet.r160_in1k for test_resnet (no network). Download it"),
    ],
)
def test_weights_that_are_not_to_be_had(
    pretrained: str, expected: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, as for other mistakes, and no traceback."""
    create = timm.create_model

    def offline(*args: Any, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no network")
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.chdir(tmp_path)
    text = fails("train", "scenes", "--set", f"model.options.pretrained={pretrained}",
                 "model.backbone=test_resnet", "data.train_count=16", "workers=0")  # fmt: skip
    assert expected in text


class Dying(ScenesData):
    """Scenes of which one ends the process that reads it, or takes all memory."""

    def dataset(self, split: str):  # type: ignore[no-untyped-def]
        inner = super().dataset(split)
        read, kind = inner.read, self.kind

        def fail(index: int):  # type: ignore[no-untyped-def]
            if index == 2 and kind == "killed":
                os.kill(os.getpid(), 9)
            if index == 2:
                raise MemoryError
            return read(index)

        inner.read = fail  # type: ignore[method-assign]
        return inner

    kind = "killed"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["killed", "memory"])
def test_loader_processes(kind: str, training: bool) -> None:
    data = Dying(train_count=4, val_count=4, size=(32, 32))
    data.kind = kind
    dataset = data.dataset("train" if training else "val")
    loader = (
        training_loader(dataset, batch_size=2, seed=0, epoch=0, workers=1)
        if training
        else evaluation_loader(dataset, workers=1)
    )
    expected = {
        "killed": r"a process that loads data ended early \(.*--workers",
        "memory": rf"{dataset.name(2)}: not enough memory; use fewer processes",
    }[kind]
    # In a process of its own: after a loader's death PyTorch raises in the main thread, anywhere.
    error = bounded(list, loader, megabytes=2000).error
    assert re.match(f"TooLittleMemoryError: {expected}", error) and "\n" not in error
