"""Training on CamVid with the released package's own model, optimiser and schedule, beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcibi_fast.data import CAMVID_CLASSES, FolderDataset, TrainTransform
from mcibi_fast.data.loading import training_loader
from mcibi_fast.recipes import OptimizerConfig
from mcibi_fast.training.optim import build_optimizer
from mcibi_fast.training.schedule import Schedule
from tests.compat import zoo_models as zoo
from tests.compat.test_zoo import pair, relative_error, renamed
from tests.learning import share_left

EPOCHS, BATCH, CROP, IGNORED = 2, 8, (64, 80), -100
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


@pytest.mark.slow
def test_two_epochs_on_camvid(camvid: Path, generator: torch.Generator) -> None:
    """At each of 90 steps the same loss and the same change of weights and memory, up to rounding.

    Left to themselves, two trainings part within ten steps, as rounding errors grow a hundredfold
    a step (the package beside a copy of itself with weights changed by 1e-15 does so, too). After
    each step ours therefore takes over the package's weights; the optimiser's momentum is its own.
    """
    from ssseg.modules.models.optimizers import BuildOptimizer
    from ssseg.modules.models.schedulers import BuildScheduler

    entry = zoo.PUBLISHED["mcibiplusplus_resnet50os8_cityscapes"]
    released, loaded = pair(entry.name, generator)
    released.train()
    loaded.train()
    data = FolderDataset(camvid, "train", classes=CAMVID_CLASSES)
    data.transform = TrainTransform(CROP, mean=data.mean, std=data.std, seed=0)
    per_epoch = len(data) // BATCH
    sgd = {"type": "SGD", "params_rules": {}, **SGD}
    its_optimizer = BuildOptimizer(released, sgd)
    its_schedule = BuildScheduler(
        its_optimizer,
        {"type": "PolyScheduler", "max_epochs": EPOCHS, "power": 0.9, "lr": SGD["lr"]}
        | {"iters_per_epoch": per_epoch, "optimizer": sgd, "params_rules": {}},
    )
    config = OptimizerConfig(**SGD, floor=0.01)
    optimizer = build_optimizer(loaded, config)
    schedule = Schedule(optimizer, config, EPOCHS * per_epoch)
    own = loaded.state_dict()

    losses: list[float] = []
    for epoch in range(EPOCHS):
        for batch in training_loader(data, batch_size=BATCH, seed=0, epoch=epoch):
            images = batch["image"].double()
            labels = batch["label"].long().masked_fill(batch["label"] == 255, IGNORED)

            rate = its_schedule.updatelr()
            its_optimizer.zero_grad()
            with torch.random.fork_rng(devices=[]):  # it seeds the global generator
                out = released(
                    zoo.inputs(images, labels, "TRAIN"), learning_rate=rate, epoch=epoch + 1
                )
            out.loss.backward()
            its_schedule.step()

            factor = schedule.apply(len(losses))
            loaded.schedule(epoch=epoch, lr_factor=factor)
            loss = torch.stack(list(loaded(images, labels).losses.values())).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            losses.append(loss.item())
            assert schedule.lr == pytest.approx(rate, rel=1e-12)
            assert losses[-1] == pytest.approx(out.loss.item(), rel=1e-12), len(losses)
            for name, value in renamed(entry, loaded, dict(released.state_dict())).items():
                if value.is_floating_point():
                    assert relative_error(own[name], value) < 1e-9, (len(losses), name)
                    own[name].copy_(value)
    assert len(losses) == EPOCHS * per_epoch == 90
    assert share_left(losses, first=10, last=10) < 0.9
