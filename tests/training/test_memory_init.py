"""The memory's first values, from pixels of the train split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training import memory_init
from mcibi_fast.training.memory_init import initialize_memory
from mcibi_fast.training.run import Run
from mcibi_fast.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def make_trainer(config: TrainConfig, out: Path) -> Trainer:
    generator_state = torch.get_rng_state()
    trainer = Trainer(config, Run(out))
    trainer.close()
    torch.set_rng_state(generator_state)
    return trainer


def initialize(trainer: Trainer, batch_size: int = 4) -> None:
    initialize_memory(
        trainer.model, trainer.train_data, trainer.accelerator, batch_size=batch_size, seed=0
    )


def test_every_class_of_the_split_is_met(tiny_config: MakeConfig, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(), tmp_path)
    memory = trainer.model.memory
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    assert not memory.met.any()
    initialize(trainer)
    trainer.train_data.set_epoch(0)
    labels = torch.cat([trainer.train_data[i]["label"].flatten() for i in range(13)])
    present = torch.unique(labels[labels != 255]).long()
    assert len(present) > 5
    assert memory.met[present].all()
    assert int(memory.met.sum()) == len(present)
    # Classes met have a mean and a deviation of their own, the others are still (0, 1).
    assert (memory.memory[~memory.met] == torch.tensor([0.0, 1.0])).all()
    assert (memory.memory[memory.met] != torch.tensor([0.0, 1.0])).any(1).all()
    for name, tensor in trainer.model.state_dict().items():
        assert name.endswith("memory.memory") or torch.equal(tensor, before[name]), name


def test_it_stops_when_all_are_met(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_config("data.train_count=60"), tmp_path)
    passes = []
    loader = memory_init.training_loader

    def counting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in loader(*args, **kwargs):
            passes.append(len(batch["name"]))
            yield batch

    monkeypatch.setattr(memory_init, "training_loader", counting)
    initialize(trainer)
    assert trainer.model.memory.met.all()
    assert sum(passes) < 60


def test_repeats_and_ignores_the_global_generators(tiny_config: MakeConfig, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(), tmp_path)
    memory = trainer.model.memory
    state = torch.get_rng_state()
    results = []
    for _ in range(2):
        memory.met.zero_()
        memory.memory.copy_(torch.tensor([0.0, 1.0]).expand_as(memory.memory))
        initialize(trainer)
        results.append(memory.memory.clone())
    assert torch.equal(*results)
    assert torch.equal(state, torch.get_rng_state())


def test_released_form_starts_at_zero_and_one(tiny_config: MakeConfig, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config("model.options.form=released"), tmp_path)
    initialize(trainer)
    expected = torch.tensor([0.0, 1.0]).expand_as(trainer.model.memory.memory)
    assert torch.equal(trainer.model.memory.memory, expected)


# ---- MCIBI's memory, and clusters ----------------------------------------------


def present_classes(trainer: Trainer) -> torch.Tensor:
    trainer.train_data.set_epoch(0)
    count = len(trainer.train_data)
    labels = torch.cat([trainer.train_data[i]["label"].flatten() for i in range(count)])
    return torch.unique(labels[labels != 255]).long()


MCIBI = ("model.name=fcn_mcibi", "model.options.representations=2")


@pytest.mark.parametrize("init", ["cluster", pytest.param("pixel", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [(), MCIBI], ids=["gaussian", "representations"])
def test_every_initialisation_meets_every_class(
    settings: tuple[str, ...], init: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config("data.train_count=4", *settings)  # in which not every class occurs
    config.model.options["init"] = init
    trainer = make_trainer(config, tmp_path)
    memory = trainer.model.memory
    standard = memory.memory[0].clone()
    norms = {name: t.clone() for name, t in trainer.model.state_dict().items() if "running" in name}
    state = torch.get_rng_state()
    assert not memory.met.any()
    initialize(trainer)
    present = present_classes(trainer)
    absent = sorted(set(range(len(memory.met))) - set(present.tolist()))
    assert absent and norms
    assert memory.met[present].all() and not memory.met[absent].any()
    assert all(torch.equal(memory.memory[k], standard) for k in absent)
    assert all(not torch.equal(memory.memory[k], standard) for k in present)
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in norms.items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    # Again from the start: the same bits.
    twin = make_trainer(config, tmp_path / "twin")
    twin.model.load_state_dict(trainer.model.state_dict())
    twin.model.memory.memory.copy_(standard.expand_as(memory.memory))
    if not settings:
        twin.model.memory.met.zero_()
    initialize(twin)
    assert torch.equal(twin.model.memory.memory, memory.memory)


def test_clusters_come_from_a_part_of_the_split(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the limit only images with classes not met before are looked at."""
    config = tiny_config("data.train_count=60")
    config.model.options["init"] = "cluster"
    trainer = make_trainer(config, tmp_path)
    looked_at = []
    plain = trainer.model.pixel_representations

    def counting(images: torch.Tensor) -> torch.Tensor:
        looked_at.append(len(images))
        return plain(images)

    monkeypatch.setattr(trainer.model, "pixel_representations", counting)
    monkeypatch.setattr(memory_init, "CLUSTERED_IMAGES", 20)
    initialize(trainer)
    assert 20 <= sum(looked_at) < 60
    assert trainer.model.memory.met.all()


def test_mcibi_as_released_starts_at_zero(tiny_config: MakeConfig, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config("model.name=fcn_mcibi"), tmp_path)
    initialize(trainer)
    assert not trainer.model.memory.memory.any()
