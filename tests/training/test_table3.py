"""The rows of Tables 1 and 3 can be trained and evaluated: two steps on built-in scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import train
from mcibi_fast.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]

WIDTHS = {"feats_channels": 8, "transform_channels": 8}
ROWS = {
    "FCN": ("fcn", {"feats_channels": 8}),
    "Memory-R": ("fcn_mcibi", {**WIDTHS, "init": "pixel", "memory_update": False}),
    "Memory-R, update": ("fcn_mcibi", WIDTHS),
    "Memory-D, update": ("fcn_mcibipp", WIDTHS),
    "Memory-D, update, IIS": ("fcn_mcibipp", {**WIDTHS, "stages": 2}),
}


def config_of(tiny_config: MakeConfig, name: str, options: dict) -> TrainConfig:
    config = tiny_config("data.train_count=8", "epochs=1", "checkpoint_every=0")
    config.model.name, config.model.options = name, dict(options)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_row_of_table_3(row: str, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(tiny_config, *ROWS[row])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = train(config, tmp_path, progress=False, report=lambda line: None)
    assert result.steps == 2
    assert 0 <= result.metrics["mean_iou"] <= 1
    model, _ = load_model(tmp_path)
    if row == "FCN":
        assert not hasattr(model, "memory")
        return
    assert model.memory.memory.isfinite().all()
    if row == "Memory-D, update, IIS":
        images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one, two = (model(images, stages=stages).logits for stages in (1, 2))
            assert torch.equal(model(images).logits, two)
        assert not torch.equal(one, two)


def test_memory_that_is_fixed_keeps_its_pixels(tiny_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(config_of(tiny_config, *ROWS["Memory-R"]), Run(tmp_path))
    trainer.start()
    met, before = trainer.model.memory.met, trainer.model.memory.memory.clone()
    assert met.sum() > 5
    trainer.run_to_end()
    trainer.close()
    assert torch.equal(trainer.model.memory.memory[met], before[met])


def test_ground_truth_of_table_1(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Two steps, and an evaluation that passes the labels."""
    config = config_of(tiny_config, "fcn_mcibipp", {**WIDTHS, "weights_from": "labels"})
    trainer = Trainer(config, Run(tmp_path))
    batch = [trainer.train_data[i] for i in range(4)]
    images, labels = (torch.stack([sample[k] for sample in batch]) for k in ("image", "label"))
    trainer.wrapped.train()
    for _ in range(2):
        trainer._train_step({"image": images, "label": labels})
    confusion = evaluate(trainer.model, trainer.val_data)
    trainer.close()
    labels = [torch.as_tensor(sample["label"]) for sample in trainer.val_data]
    assert confusion.matrix.sum() == sum(int((label != 255).sum()) for label in labels)


@pytest.mark.slow
def test_a_resumed_mcibi_run_is_the_same(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """The memory, its first values and the schedule need no state but the weights."""
    options = {**WIDTHS, "init": "cluster", "momentum_schedule": "poly"}
    for name in ("whole", "parts"):
        config = config_of(tiny_config, "fcn_mcibi", options)
        config.epochs = 2
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trainer = Trainer(config, Run(tmp_path / name))
            trainer.start()
            if name == "parts":
                trainer._train_epoch(lambda: False)
            else:
                trainer.run_to_end()
            trainer.close()
    with torch.random.fork_rng():
        train(config, tmp_path / "parts", resume=True, progress=False, report=lambda line: None)
    states = [load_model(tmp_path / name)[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
