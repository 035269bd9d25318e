"""Training: what it refuses, what it leaves behind, and that it learns."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mcibi_fast import files
from mcibi_fast.errors import TrainingError
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training import trainer as trainer_module
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import (
    random_state,
    restore_random_state,
    restore_transient_buffers,
    seed_global_generators,
    transient_buffers,
)
from mcibi_fast.training.train import TrainResult, train
from mcibi_fast.training.trainer import Trainer
from tests.learning import share_left

MakeConfig = Callable[..., TrainConfig]


def quiet(config: TrainConfig, out: Path, *, resume: bool = False) -> TrainResult:
    if not resume:
        seed_global_generators(0)
    return train(config, out, resume=resume, progress=False, report=lambda line: None)


@pytest.mark.parametrize("model", ["fcn", "fcn_mcibipp"])
def test_a_run_from_start_to_end(tiny_config: MakeConfig, tmp_path: Path, model: str) -> None:
    config = tiny_config(f"model.name={model}", "optimizer.name=adamw", "optimizer.clip_norm=1")
    if model == "fcn":
        config.model.options = {"feats_channels": 8}
    lines: list[str] = []
    seed_global_generators(0)
    result = train(config, tmp_path, progress=False, report=lines.append)
    assert result.steps == 6 and len(lines) == 2 and "mIoU" in lines[0]
    run = Run(tmp_path)
    assert TrainConfig.from_dict(run.config()) == config
    names = {p.name for p in run.checkpoints.iterdir()}
    assert names == {"last", "best", "step-00000006", run.checkpoint("best").name}
    assert not list(tmp_path.rglob("*.tmp"))
    assert list((tmp_path / "tensorboard").iterdir())
    readings = [e for e in run.history() if "loss" in e]
    assert [e["step"] for e in readings] == [2, 3, 4, 6]
    assert all(e["loss"] == pytest.approx(sum(e["losses"].values())) for e in readings)

    # The weights on disk give the scores that were reported.
    trained, spec = load_model(tmp_path / "checkpoints" / "last")
    data = config.data.dataset("val")
    metrics = evaluate(trained, data).compute()
    assert metrics.as_dict(spec.classes) == result.metrics


def test_learning_rate_follows_the_schedule(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config("log_every=1", "optimizer.floor=0.01")
    quiet(config, tmp_path)
    rates = [e["lr"] for e in Run(tmp_path).history() if "loss" in e]
    expected = [0.01 * (0.01 + 0.99 * (1 - step / 6) ** 0.9) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_the_model_is_told_where_training_stands(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float]] = []
    monkeypatch.setattr(
        Segmentor, "schedule", lambda self, *, epoch, lr_factor: calls.append((epoch, lr_factor))
    )
    quiet(tiny_config("optimizer.warmup_steps=2", "optimizer.warmup_start=0.5"), tmp_path)
    warmup = [0.5, 0.75, 1, 1, 1, 1]
    expected = [(step // 3, warmup[step] * (1 - step / 6) ** 0.9) for step in range(6)]
    assert [epoch for epoch, _ in calls] == [epoch for epoch, _ in expected]
    assert [f for _, f in calls] == pytest.approx([f for _, f in expected], rel=1e-12)


def test_history_of_the_memory(tiny_config: MakeConfig, tmp_path: Path) -> None:
    quiet(tiny_config(), tmp_path)
    entries = [e for e in Run(tmp_path).history() if "memory" in e]
    assert [(e["step"], e["epoch"]) for e in entries] == [(3, 1), (6, 2)]
    model, _ = load_model(tmp_path / "checkpoints" / "last")
    last = entries[-1]["memory"]
    assert [last["mean"], last["std"]] == model.memory.memory.t().tolist()
    assert entries[0]["memory"] != last
    assert np.isfinite([last["mean"], last["std"]]).all()


@pytest.mark.slow
def test_synchronised_batch_norms_are_a_choice(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[torch.nn.Module] = []

    def convert(model: torch.nn.Module) -> torch.nn.Module:
        converted.append(model)
        return model

    monkeypatch.setattr(trainer_module.models, "convert_sync_batchnorm", convert)
    for choice, expected in (("false", 0), ("true", 1)):
        Trainer(tiny_config(f"sync_batchnorm={choice}"), Run("unused")).close()
        assert len(converted) == expected


def test_it_learns(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Of one batch, which each epoch is, in 40 steps; a third of the loss is left."""
    config = tiny_config(
        *("data.train_count=4", "augmentation.scale=[1,1]", "augmentation.crop_size=[40,40]"),
        *("epochs=40", "evaluate_every=40", "checkpoint_every=0", "log_every=1"),
        *("optimizer.lr=0.05", "model.options.dropout=0"),
    )
    quiet(config, tmp_path)
    losses = [e["loss"] for e in Run(tmp_path).history() if "loss" in e]
    assert share_left(losses, first=3, last=6) < 0.75


def test_bf16(tiny_config: MakeConfig, tmp_path: Path) -> None:
    result = quiet(tiny_config("mixed_precision=bf16", "epochs=1"), tmp_path)
    assert result.steps == 3
    model, _ = load_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.memory.memory.dtype == torch.float32


def test_loss_that_is_not_finite(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def diverging_step(self: Trainer, batch: dict) -> None:
        if self.step == 4:
            batch["image"] = batch["image"] * float("nan")
        step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", diverging_step)
    with pytest.raises(TrainingError, match=r"not finite at step 5 \(.*nan.*step-00000004") as info:
        quiet(tiny_config("log_every=100"), tmp_path)
    assert "\n" not in str(info.value)
    model, _ = load_model(tmp_path / "checkpoints" / "last")
    assert all(p.isfinite().all() for p in model.parameters())
    assert Run(tmp_path).load_state()[1]["step"] == 4


def test_weights_that_are_not_finite_are_not_saved(tiny_config: MakeConfig, tmp_path: Path) -> None:
    quiet(tiny_config("epochs=1"), tmp_path)
    model, spec = load_model(tmp_path)
    next(model.parameters()).data[0] = float("inf")
    with pytest.raises(ValueError, match="not finite; not saved"):
        pack_weights(model, spec)


@pytest.mark.slow
def test_full_disk_keeps_the_checkpoint_before(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files._write_synced
    written = 0

    def failing_write(path: Path, content: bytes) -> None:
        nonlocal written
        if path.name == "state.pt":
            written += 1
            if written == 2:
                path.write_bytes(content[:1000])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_synced", failing_write)
        with pytest.raises(
            OSError, match="checkpoint of step 3 not written: No space left"
        ) as info:
            quiet(tiny_config(), tmp_path)
    assert info.value.errno == errno.ENOSPC
    run = Run(tmp_path)
    assert f"the one before is intact: {run.checkpoint('last')}" in str(info.value)
    assert {p.name for p in run.checkpoints.iterdir()} == {"last", "step-00000002"}
    assert quiet(tiny_config(), tmp_path, resume=True).steps == 6


def test_a_batch_larger_than_the_split(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 14 is more than the 13 training samples"):
        quiet(tiny_config("batch_size=14"), tmp_path)


def test_ctrl_c_before_the_first_checkpoint(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_start(self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped; no checkpoint yet$"):
        quiet(tiny_config(), tmp_path)


def test_best_is_the_first_of_equals(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run = Run(tmp_path)
    trainer = Trainer(tiny_config(), run)
    trainer.evaluated = {3: {"mean_iou": 0.1}, 6: {"mean_iou": 0.3}, 9: {"mean_iou": 0.3}}
    assert trainer._best_step() == 6
    trainer.evaluated = {3: {"mean_iou": None}}
    assert trainer._best_step() == 3
    trainer.close()


def test_best_and_last_are_kept(tmp_path: Path, tiny_config: MakeConfig) -> None:
    model, spec = _model_and_spec(tiny_config())
    run = Run(tmp_path)
    run.start({})
    for step in (1, 2, 3, 4):
        run.save(step, pack_weights(model, spec), {"step": step})
        if step == 2:
            run.mark_best(step)
    assert run.checkpoint("best").name == "step-00000002"
    assert run.checkpoint("last").name == "step-00000004"
    assert len(list(run.checkpoints.glob("step-*"))) == 2


def _model_and_spec(config: TrainConfig) -> tuple[Segmentor, ModelSpec]:
    trainer = Trainer(config, Run("unused"))
    trainer.close()
    return trainer.model, trainer.spec


def test_history_survives_a_cut_line_and_rewinds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.record(step=step, loss=0.5)
    with run.history_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [e["step"] for e in run.history()] == [1, 2, 3]
    run.rewind(2)
    run.record(step=3, loss=0.1)
    assert [e["step"] for e in run.history()] == [1, 2, 3]
    assert run.history()[-1]["loss"] == 0.1


@pytest.mark.slow
def test_damaged_state(tiny_config: MakeConfig, tmp_path: Path) -> None:
    quiet(tiny_config("epochs=1"), tmp_path)
    state = tmp_path / "checkpoints" / "last" / "state.pt"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"resume: .*state.pt is damaged"):
        quiet(tiny_config(), tmp_path, resume=True)


def test_global_generators_round_trip() -> None:
    before = random_state()
    try:
        seed_global_generators(3)
        state = random_state()
        first = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        restore_random_state(state)
        second = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        assert torch.equal(first[0], second[0]) and first[2] == second[2]
        assert np.array_equal(first[1], second[1])
    finally:
        restore_random_state(before)


def test_transient_buffers_are_the_non_persistent_ones(tiny_config: MakeConfig) -> None:
    model, _ = _model_and_spec(tiny_config())
    saved = {name: b.clone() for name, b in transient_buffers(model).items()}
    assert any(name.endswith("noise_state") for name in saved)
    assert not any(name.endswith(".memory") for name in saved)
    model.memory.noise_state[1] = 1000
    restore_transient_buffers(model, saved)
    assert model.memory.noise_state[1] == 1
    with pytest.raises(ValueError, match="transient buffers differ: other"):
        restore_transient_buffers(model, saved | {"other": torch.zeros(1)})


def test_training_leaves_its_seeding_to_the_caller(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((torch, "manual_seed"), (np.random, "seed"), (random, "seed")):
        monkeypatch.setattr(module, name, lambda *a: pytest.fail("a global generator was seeded"))
    # No dropout, no fresh weights after construction: nothing else may draw either.
    config = tiny_config("model.options.dropout=0", "epochs=1")
    constructed = {}
    start = Trainer.start

    def noting_start(self: Trainer) -> None:
        constructed["state"] = torch.get_rng_state()
        start(self)

    monkeypatch.setattr(Trainer, "start", noting_start)
    train(config, tmp_path, progress=False, report=lambda line: None)
    assert torch.equal(constructed["state"], torch.get_rng_state())
