"""The mixed precision that a training chooses, and the switches of PyTorch that it sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mcibi_fast import models
from mcibi_fast.ablations.runs import TrainedRun
from mcibi_fast.models.weights import Precision, read_spec
from mcibi_fast.recipes import OptimizerConfig, SpeedConfig, TrainConfig
from mcibi_fast.training import precision
from mcibi_fast.training.optim import build_optimizer
from mcibi_fast.training.precision import fast_kernels, step_seconds, with_precision
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import random_state, restore_optimizer
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config

pytestmark = pytest.mark.usefixtures("own_generator")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def of_device(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, bf16: bool) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize(
    ("gpu", "bf16", "device", "chosen"),
    [
        (True, True, "auto", "bf16"),
        (True, False, "auto", "no"),
        (True, True, "cpu", "no"),
        (False, True, "auto", "no"),
    ],
)
def test_auto_goes_by_the_device(
    gpu: bool, bf16: bool, device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_device(monkeypatch, gpu=gpu, bf16=bf16)
    assert TrainConfig().mixed_precision == ("auto" if gpu else "no")
    config = make_tiny_config(f"device={device}", "mixed_precision=auto")
    lines: list[str] = []
    assert with_precision(config, lines.append).mixed_precision == chosen
    assert config.mixed_precision == "auto"  # the caller's is left alone
    on_gpu = gpu and device != "cpu"
    assert [line.startswith(f"mixed precision {chosen}: this GPU") for line in lines] == (
        [True] * on_gpu
    )


@pytest.mark.parametrize("choice", ["no", "bf16", "fp16"])
def test_what_was_asked_for_is_used(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_device(monkeypatch, gpu=True, bf16=True)
    config = make_tiny_config(f"mixed_precision={choice}")
    assert with_precision(config, pytest.fail) is config


@pytest.mark.parametrize(
    ("times", "chosen"),
    [((2.0, 1.0), "bf16"), ((1.12, 1.0), "bf16"), ((1.08, 1.0), "no"), ((1.0, 2.0), "no")],
)
def test_measured_goes_by_the_times(
    times: tuple[float, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_device(monkeypatch, gpu=False, bf16=True)
    asked: list[tuple[torch.device, int]] = []

    def seconds(_: TrainConfig, device: torch.device, count: int) -> dict[Precision, float]:
        asked.append((device, count))
        return {"no": times[0], "bf16": times[1]}

    monkeypatch.setattr(precision, "step_seconds", seconds)
    monkeypatch.setattr(precision, "PartialState", lambda cpu: _Alone())
    lines: list[str] = []
    config = with_precision(make_tiny_config("mixed_precision=measured"), lines.append)
    assert asked == [(CPU, 1)] and config.mixed_precision == config.precision == chosen
    assert lines == [
        f"mixed precision {chosen}: a step takes {times[1]:.2f} s in bf16 and {times[0]:.2f} s in "
        "float32"
    ]


class _Alone:
    is_main_process, num_processes, device = True, 1, CPU


def test_a_run_stores_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its resumption, and for evaluations of its checkpoints; the training uses it."""
    of_device(monkeypatch, gpu=False, bf16=True)
    monkeypatch.setattr(precision, "step_seconds", lambda *_: {"no": 2.0, "bf16": 1.0})
    config = make_tiny_config("mixed_precision=measured", "epochs=1", "model.memory=null")
    config.model.options = {"feats_channels": 8}
    lines: list[str] = []
    train(config, tmp_path, progress=False, report=lines.append)
    assert [line for line in lines if line.startswith("mixed precision ")] == [
        "mixed precision bf16: a step takes 1.00 s in bf16 and 2.00 s in float32"
    ]
    assert json.loads((tmp_path / "config.json").read_text())["mixed_precision"] == "bf16"
    assert Run(tmp_path).settings().precision == "bf16"
    assert read_spec(Run(tmp_path).weights()).mixed_precision == "bf16"


def test_a_processor_without_bf16_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of_device(monkeypatch, gpu=False, bf16=False)
    monkeypatch.setattr(precision, "step_seconds", pytest.fail)
    lines: list[str] = []
    config = with_precision(make_tiny_config("mixed_precision=measured"), lines.append)
    assert config.mixed_precision == "no"
    assert lines == ["mixed precision no: this processor does not compute in bf16"]


@pytest.mark.parametrize("history", [0, 1])
def test_measuring_leaves_no_trace(history: int) -> None:
    torch.manual_seed(3)
    before = random_state()
    config = make_tiny_config(f"model.history={history}")
    found = step_seconds(config, CPU)
    assert list(found) == ["no", "bf16"] and all(0 < value < 60 for value in found.values())
    after = random_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]


def test_what_earlier_versions_stored() -> None:
    stored = TrainConfig().to_dict()
    assert TrainConfig.from_dict(stored) == TrainConfig()
    del stored["mixed_precision"], stored["speed"]
    old = TrainConfig.from_dict(stored)
    assert old.mixed_precision == old.precision == "no"
    assert old.speed == SpeedConfig(False, False, False, compile=False)


def test_ablations_continue_runs_of_earlier_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what these runs used, not with today's defaults."""
    content = make_tiny_config("mixed_precision=bf16").to_dict()
    del content["speed"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(Run, "checkpoint", lambda *_: tmp_path)
    config = TrainedRun(make_tiny_config("mixed_precision=auto"), tmp_path).config
    assert config.mixed_precision == "bf16"
    assert config.speed == SpeedConfig.of_earlier_versions()
    with pytest.raises(ValueError, match="mixed_precision"):
        TrainedRun(make_tiny_config("mixed_precision=no"), tmp_path)


def flags() -> tuple[str, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark


@pytest.mark.parametrize(
    ("speed", "inside"),
    [
        (SpeedConfig(), ("high", True, True)),
        (SpeedConfig(tf32=False), ("highest", False, True)),
        (SpeedConfig(cudnn_benchmark=False), ("high", True, False)),
    ],
)
def test_the_switches_of_a_gpu_are_put_back(
    speed: SpeedConfig, inside: tuple[str, bool, bool]
) -> None:
    before = flags()
    with pytest.raises(RuntimeError), fast_kernels(speed, CUDA):
        assert flags() == inside
        raise RuntimeError
    assert flags() == before
    with fast_kernels(speed, CPU):
        assert flags() == before


def test_training_steps_have_the_switches_and_evaluations_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is taken for a GPU."""
    monkeypatch.setattr(
        "mcibi_fast.training.trainer.fast_kernels", lambda speed, _: fast_kernels(speed, CUDA)
    )
    seen: dict[bool, set[tuple[str, bool, bool]]] = {True: set(), False: set()}
    forward = models.Segmentor.forward

    def spied(self: models.Segmentor, *args: object, **options: object) -> object:
        seen[self.training].add(flags())
        return forward(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(models.Segmentor, "forward", spied)
    before = flags()
    train(make_tiny_config("epochs=1"), tmp_path, progress=False, report=lambda line: None)
    assert seen == {True: {("high", True, True)}, False: {before}} and flags() == before


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimizer_is_for_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.create("fcn", 3, "test_resnet", feats_channels=8)
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    asked: list[object] = []

    def spied(*_: object, fused: object, **__: object) -> None:
        asked.append(fused)

    kind = {"sgd": "SGD", "adamw": "AdamW"}[name]
    own = build_optimizer(model, config, fused=True)
    assert type(own).__name__ == kind and own.param_groups[0]["fused"] is None
    monkeypatch.setattr(torch.optim, kind, spied)
    monkeypatch.setattr(torch.nn.Parameter, "device", CUDA)
    for fused in (True, False):
        build_optimizer(model, config, fused=fused)
    assert asked == [True, None]


def test_a_run_goes_on_with_the_kernels_of_its_new_device() -> None:
    model = models.create("fcn", 3, "test_resnet", feats_channels=8)
    optimizer = build_optimizer(model, OptimizerConfig())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["fused"] = True  # as a GPU stored it
    restore_optimizer(optimizer, saved)
    assert optimizer.param_groups[0]["fused"] is None
