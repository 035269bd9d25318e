"""Order of samples, shares of ranks, errors from workers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any

import numpy as np
import pytest
import torch

from mcibi_fast.data.loading import (
    copied_beside,
    evaluation_loader,
    loader_processes,
    training_loader,
    training_order,
    usable_cores,
)
from mcibi_fast.data.notes import Notes
from mcibi_fast.errors import DataWarning


class Numbers:
    """Sample i is an image full of i; sizes differ between samples where asked to."""

    classes = ("a", "b")
    ignore_index = 255

    def __init__(self, length: int, *, odd_sizes: bool = False, bad: int | None = None) -> None:
        self.length, self.odd_sizes, self.bad = length, odd_sizes, bad
        self.epoch, self.notes = -1, Notes()

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.bad:
            raise ValueError(f"images/{index}.jpg: cannot be decoded")
        width = 8 + index % 2 if self.odd_sizes else 8
        label = torch.full((6, width), index, dtype=torch.uint8)
        return {"image": label.float().expand(3, 6, width), "label": label, "name": str(index)}


def names(loader: Any) -> list[list[str]]:
    return [batch["name"] for batch in loader]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    order = training_order(23, 4, seed=3, epoch=5)
    assert order == training_order(23, 4, seed=3, epoch=5)
    assert order != training_order(23, 4, seed=3, epoch=6)
    assert order != training_order(23, 4, seed=4, epoch=5)
    flat = [index for batch in order for index in batch]
    assert len(order) == 5 and len(set(flat)) == 20
    whole = training_order(23, 4, seed=3, epoch=5, drop_last=False)
    assert whole[:5] == order and sorted(flat + whole[5]) == [*range(23)]
    loader = training_loader(Numbers(23), batch_size=4, seed=3, epoch=5)
    assert names(loader) == [[str(i) for i in batch] for batch in order]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_ranks_share_the_global_batch() -> None:
    alone = names(training_loader(Numbers(23), batch_size=4, seed=0, epoch=0))
    first, second = (
        names(training_loader(Numbers(23), batch_size=4, seed=0, epoch=0, rank=rank, world_size=2))
        for rank in (0, 1)
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_start_leaves_out_what_was_done(workers: int) -> None:
    dataset = Numbers(23)
    whole = names(training_loader(dataset, batch_size=4, seed=0, epoch=7))
    rest = names(training_loader(dataset, batch_size=4, seed=0, epoch=7, start=3, workers=workers))
    assert rest == whole[3:]
    assert dataset.epoch == 7


def test_a_split_smaller_than_a_batch_and_indivisible_batches() -> None:
    assert training_order(3, 4, seed=0, epoch=0) == []
    assert len(training_order(3, 4, seed=0, epoch=0, drop_last=False)[0]) == 3
    with pytest.raises(ValueError, match="batch_size: 5 is not a multiple of 2 processes"):
        training_loader(Numbers(23), batch_size=5, seed=0, epoch=0, world_size=2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processes bound to cores")
def test_one_core_has_one_process_and_no_warning() -> None:
    """PyTorch warns of more processes than cores; more are asked for by default."""
    whole = names(training_loader(Numbers(23), batch_size=4, seed=0, epoch=0))
    cores = os.sched_getaffinity(0)
    assert usable_cores() == len(cores)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert [loader_processes(n) for n in (0, 1, 8)] == [0, 1, 1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = training_loader(Numbers(23), batch_size=4, seed=0, epoch=0, workers=8)
            assert names(loader) == whole
            assert len(list(evaluation_loader(Numbers(3), workers=8))) == 3
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_one_clear_line(workers: int) -> None:
    others = set(active_children())
    for loader in (
        training_loader(Numbers(9, bad=4), batch_size=3, seed=0, epoch=0, workers=workers),
        evaluation_loader(Numbers(9, bad=4), batch_size=3, workers=workers),
    ):
        with pytest.raises(ValueError, match=r"^images/4.jpg: cannot be decoded$") as caught:
            list(loader)
        assert caught.traceback  # does not keep the processes
        assert set(active_children()) <= others


def test_batches_are_copied_on_a_stream_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of CUDA, and in which order; a GPU is not needed."""
    asked: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "beside" if isinstance(name, torch.device) else name

        def wait_stream(self, other: Stream) -> None:
            asked.append((self.name, "waits for", other.name))

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        asked.append(("on", stream.name))
        yield
        asked.append(("end", stream.name))

    class OnHost(torch.Tensor):
        def to(self, device: torch.device, **options: Any) -> torch.Tensor:
            asked.append(("copy", device.type, options))
            return self

        def record_stream(self, stream: Any) -> None:
            asked.append(("kept for", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    batches = [{"image": torch.full((2,), i).as_subclass(OnHost), "name": ["a"]} for i in range(2)]
    for number, batch in enumerate(copied_beside(iter(batches), torch.device("cuda"))):
        assert int(batch["image"][0]) == number and batch["name"] == ["a"]
        copy = ("copy", "cuda", {"non_blocking": True})
        moved = [("on", "beside"), copy, ("end", "beside"), ("steps", "waits for", "beside")]
        assert asked == [*moved, ("kept for", "steps")]
        asked.clear()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_deals_every_sample_once(world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        loader = evaluation_loader(
            Numbers(7, odd_sizes=True), batch_size=4, rank=rank, world_size=world_size
        )
        for groups in loader:
            for batch in groups:
                seen += batch["name"]
                assert batch["image"].shape[-2:] == batch["label"].shape[-2:]
                assert len({int(name) % 2 for name in batch["name"]}) == 1
    assert sorted(seen) == sorted(map(str, range(7)))


def test_labels_that_are_all_ignored_warn_once() -> None:
    dataset = Numbers(256)
    loader = training_loader(dataset, batch_size=1, seed=0, epoch=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(loader)) == 256
        list(training_loader(dataset, batch_size=1, seed=0, epoch=1))
    assert [(each.category, str(each.message)) for each in caught] == [
        (
            DataWarning,
            "255: no pixel of a batch has a class: all are 255, which is ignored; see whether the "
            "masks are right with mcibi-fast data check (said once)",
        )
    ]
