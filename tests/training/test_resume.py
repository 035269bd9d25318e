"""A stopped and resumed run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import TrainResult, train
from mcibi_fast.training.trainer import Trainer

# Everything that has a state, or draws, or changes what a step is.
EVERYTHING = (
    "ema=0.9",
    "accumulate=2",
    "adversarial.probability=0.5",
    "augmentation.style_mixing=0.5",
    "augmentation.style_band=0.1",
    "loss.class_weights=balanced",
    "loss.label_smoothing=0.1",
    "loss.ohem_threshold=0.7",
    "loss.ohem_min_kept=100",
    "optimizer.backbone_lr=0.5",
    "optimizer.layer_decay=0.9",
    "optimizer.decay_norms=false",
    "optimizer.warmup_steps=3",
)

# Stops dead in the middle of step 5: after the memory's update, before the weights'.
KILLED = """
import json, os, signal, sys
import torch
from accelerate import Accelerator
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from mcibi_fast.training.trainer import Trainer
from mcibi_fast.recipes import TrainConfig

torch.set_num_threads(1)
backward = Accelerator.backward
steps = 0

def killed_backward(self, loss, **kwargs):
    global steps
    steps += 1
    backward(self, loss, **kwargs)
    if steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)

Accelerator.backward = killed_backward
seed_global_generators(7)
train(TrainConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], progress=False)
"""


def run_seeded(config: TrainConfig, out: Path, *, resume: bool = False) -> TrainResult:
    # On resuming, the seed must not matter: the states come from the checkpoint.
    seed_global_generators(99 if resume else 7)
    return train(config, out, resume=resume, progress=False, report=lambda line: None)


def final(out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    weights, state = Run(out).load_state()
    return safetensors.torch.load_file(weights), state


def assert_same_end(out: Path, expected: Path) -> None:
    weights, state = final(out)
    expected_weights, expected_state = final(expected)
    assert weights.keys() == expected_weights.keys()
    differing = [n for n in weights if not torch.equal(weights[n], expected_weights[n])]
    assert not differing
    assert state["step"] == expected_state["step"] == 6
    assert torch.equal(state["random"][0]["torch"], expected_state["random"][0]["torch"])
    for name, buffer in expected_state["transient_buffers"].items():
        assert torch.equal(buffer, state["transient_buffers"][name]), name
    momenta = [s["optimizer"]["state"] for s in (state, expected_state)]
    assert momenta[0].keys() == momenta[1].keys() and len(momenta[0]) > 0
    for index, entry in momenta[1].items():
        assert torch.equal(entry["momentum_buffer"], momenta[0][index]["momentum_buffer"])
    assert Run(out).history() == Run(expected).history()


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., TrainConfig]
) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("uninterrupted")
    run_seeded(tiny_config(), out)
    return out


def test_the_run_draws_on_everything_it_must_restore(uninterrupted: Path) -> None:
    _, state = final(uninterrupted)
    assert state["transient_buffers"]["head.context.memory.noise_state"].tolist() == [0, 7]
    assert bool(state["transient_buffers"]["head.context.memory.met"].any())
    seed_global_generators(7)
    assert not torch.equal(torch.get_rng_state(), state["random"][0]["torch"])


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_step(
    tiny_config: Callable[..., TrainConfig], uninterrupted: Path, tmp_path: Path
) -> None:
    config = tiny_config()
    out = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(config.to_dict()), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Run(out).load_state()[1]["step"] == 4  # in the middle of epoch 2
    run_seeded(TrainConfig.from_dict(Run(out).config()), out, resume=True)
    assert_same_end(out, uninterrupted)


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.slow
def test_stopped_in_the_middle_of_a_step_with_everything_on(
    tiny_config: Callable[..., TrainConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = 0
    backward = Accelerator.backward

    def killed_backward(self: Accelerator, loss: torch.Tensor) -> None:
        nonlocal passes
        passes += 1
        backward(self, loss)
        if passes == 9:  # the first of step 5's two
            raise Killed

    whole, out = tmp_path / "whole", tmp_path / "stopped"
    run_seeded(tiny_config(*EVERYTHING), whole)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", killed_backward)
        with pytest.raises(Killed):
            run_seeded(tiny_config(*EVERYTHING), out)
    assert Run(out).load_state()[1]["step"] == 4
    run_seeded(TrainConfig.from_dict(Run(out).config()), out, resume=True)
    assert_same_end(out, whole)
    weights, expected = (final(run)[1]["weights"] for run in (out, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    losses = [
        {e["loss"] for e in Run(run).history() if "loss" in e} for run in (whole, uninterrupted)
    ]
    assert len(losses[0]) == len(losses[1]) and not losses[0] & losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.thinned(only={"number": [signal.SIGINT]})
def test_ctrl_c_finishes_the_step_and_keeps_it(
    number: signal.Signals,
    tiny_config: Callable[..., TrainConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Trainer._train_step

    def interrupted_step(self: Trainer, batch: dict) -> None:
        if self.step == 4:
            os.kill(os.getpid(), number)
        step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted_step)
        with pytest.raises(
            KeyboardInterrupt, match="stopped; step-00000005 is kept; continue with"
        ):
            run_seeded(tiny_config(), tmp_path)
    assert Run(tmp_path).load_state()[1]["step"] == 5
    run_seeded(tiny_config(), tmp_path, resume=True)
    weights, expected = final(tmp_path)[0], final(uninterrupted)[0]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_ctrl_c_while_the_last_step_of_an_epoch_is_saved(
    tiny_config: Callable[..., TrainConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Trainer._save

    def interrupted_save(self: Trainer) -> None:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", interrupted_save)
        with pytest.raises(KeyboardInterrupt, match="stopped; step-00000003 is kept"):
            run_seeded(tiny_config(), tmp_path)
    run_seeded(tiny_config(), tmp_path, resume=True)
    assert_same_end(tmp_path, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(
    tiny_config: Callable[..., TrainConfig], uninterrupted: Path
) -> None:
    before, history = final(uninterrupted)[0], Run(uninterrupted).history()
    result = run_seeded(tiny_config(), uninterrupted, resume=True)
    after = final(uninterrupted)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert Run(uninterrupted).history() == history
    assert result.metrics == history[-1]["metrics"]


@pytest.mark.slow
def test_killed_between_checkpoint_and_evaluation(
    tiny_config: Callable[..., TrainConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(self: Trainer, _interrupted: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", killed)
        with pytest.raises(Killed):
            run_seeded(tiny_config(), tmp_path)
    run_seeded(tiny_config(), tmp_path, resume=True)
    assert_same_end(tmp_path, uninterrupted)


def test_resume_needs_a_run_and_a_checkpoint(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        Run(tmp_path).config()
    Run(tmp_path).start({})
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        run_seeded(tiny_config(), tmp_path, resume=True)


def test_a_new_run_does_not_overwrite_an_old_one(
    tiny_config: Callable[..., TrainConfig], uninterrupted: Path
) -> None:
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        run_seeded(tiny_config(), uninterrupted)
