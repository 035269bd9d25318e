"""Class-balanced sampling: deterministic, counted once, resumable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from mcibi_fast.data.loading import training_loader, training_order
from mcibi_fast.recipes import MovingScenesData, ScenesData, TrainConfig
from mcibi_fast.training import sampling
from mcibi_fast.training.run import Run
from mcibi_fast.training.sampling import ClassBalance, classes_in_images
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from tests.tiny_run import stopped_after_one_epoch

RARE = [[0]] * 90 + [[0, 1]] * 9 + [[2]] + [[]] * 20


def test_classes_are_drawn_equally_often() -> None:
    balance = ClassBalance(RARE)
    drawn = [i for epoch in range(50) for i in balance.order(seed=0, epoch=epoch)]
    assert len(drawn) == 50 * len(RARE)
    kinds = Counter(min(i, 99) if i >= 90 else 0 for i in drawn)
    share_of_2 = kinds[99] / len(drawn)
    assert abs(share_of_2 - 1 / 3) < 0.02
    with_1 = sum(count for i, count in kinds.items() if 90 <= i < 99) / len(drawn)
    # One third for class 1, and class 0's share of images that have both.
    assert abs(with_1 - (1 / 3 + 1 / 3 * 9 / 99)) < 0.02
    assert max(drawn) < 100  # images without a class are never drawn


def test_a_classs_images_come_in_turn() -> None:
    order = ClassBalance([[0]] * 8).order(seed=3, epoch=0)
    assert sorted(order) == list(range(8))
    order = ClassBalance([[0]] * 7 + [[1]]).order(seed=3, epoch=0)
    counts = Counter(i for i in order if i < 7)
    assert max(counts.values()) <= 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [
        ClassBalance(RARE).order(seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
    batches = training_order(120, 16, seed=0, epoch=0, order=orders[0])
    assert [i for batch in batches for i in batch] == orders[0][:112]
    with pytest.raises(ValueError, match="balanced, but no pixel of the split is labelled"):
        ClassBalance([[], []])


def test_classes_are_found_in_labels(one_process: None) -> None:
    dataset = ScenesData(train_count=5, size=(40, 44)).dataset("train")
    expected = [np.unique(dataset.read(i)[1]).tolist() for i in range(5)]
    expected = [[k for k in each if k != 255] for each in expected]
    for workers in (0, 2):
        assert classes_in_images(dataset, Accelerator(cpu=True), workers=workers) == expected
    order = ClassBalance(expected).order(seed=1, epoch=2)
    batch = next(training_loader(dataset, batch_size=5, seed=1, epoch=2, order=order))
    assert batch["name"] == [dataset.name(i) for i in order]


def test_samples_that_change_are_refused(one_process: None) -> None:
    dataset = MovingScenesData(train_count=2, size=(40, 44), length=3).dataset("train")
    with pytest.raises(
        ValueError, match=r"same samples in each epoch; give data\.train_frames=all"
    ):
        classes_in_images(dataset, Accelerator(cpu=True))


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"names": "x", "classes": [[0]]}', '{"names": "n", "classes": [[0], [9]]}',
     '{"names": "n", "classes": [[0], ["a"]]}', '{"names": "n", "classes": [[0]]}'],
)  # fmt: skip
def test_a_damaged_cache_is_not_used(tmp_path: Path, content: str) -> None:
    run = Run(tmp_path)
    (tmp_path / "label_classes.json").write_text(content)
    assert run.label_classes("n", 2, 3) is None
    run.keep_label_classes("n", [[0, 1], []])
    assert run.label_classes("n", 2, 3) == [[0, 1], []]


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal_and_does_not_count_again(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("sampling=balanced", "checkpoint_every=1")
    seed_global_generators(7)
    whole = train(config, tmp_path / "whole", progress=False, report=str)

    seed_global_generators(7)
    stopped_after_one_epoch(config, tmp_path / "run")

    def counted_again(*args, **options):
        raise AssertionError

    monkeypatch.setattr(sampling, "classes_in_images", counted_again)
    seed_global_generators(99)
    train(config, tmp_path / "run", resume=True, progress=False, report=str)
    ends = [Run(path).load_state()[0].read_bytes() for path in (whole.out, tmp_path / "run")]
    assert ends[0] == ends[1]
    monkeypatch.undo()
    seed_global_generators(7)
    shuffled = train(tiny_config(), tmp_path / "shuffled", progress=False, report=str)
    assert Run(shuffled.out).load_state()[0].read_bytes() != ends[0]


TWO = (
    "sampling=balanced", 'trackers=["csv"]', "epochs=1", "batch_size=4", "device=cpu", "workers=0",
    "log_every=1", "data.train_count=9", "data.val_count=2", "data.size=[40,44]",
    "model.backbone=test_resnet", "model.options.feats_channels=8",
    "model.options.transform_channels=8", "augmentation.crop_size=[32,32]",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_find_the_same_classes_and_one_writes(
    tmp_path: Path, one_process: None
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "mcibi_fast.cli", "train", "scenes", "--out", str(tmp_path), "--quiet"]
    subprocess.run([*launch, *command, "--set", *TWO], check=True, capture_output=True)
    dataset = ScenesData(train_count=9, size=(40, 44)).dataset("train")
    expected = classes_in_images(dataset, Accelerator(cpu=True))
    assert json.loads((tmp_path / "label_classes.json").read_text())["classes"] == expected
    names = [row.split(",")[:2] for row in (tmp_path / "scalars.csv").read_text().splitlines()]
    assert len(names) == len({tuple(name) for name in names}) > 10  # each number once
