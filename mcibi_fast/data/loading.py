"""Batches: their order depends only on (seed, epoch); ranks share them without padding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mcibi_fast.errors import (
    TooLittleMemoryError,
    is_killed_worker,
    is_out_of_memory,
    killed_worker_line,
    memory_line,
)
from mcibi_fast.interrupt import leave_to_parent, signals_blocked

if TYPE_CHECKING:
    from mcibi_fast.data.base import Sample, SegmentationDataset

Batch = dict[str, Any]
"""``image`` (B, 3, H, W), ``label`` (B, H, W), ``name``: list of B texts.

For clips with past frames ``image`` is (B, h + 1, 3, H, W), the earliest frame first.
"""


class _Carried(Dataset):
    """Returns the error of a bad sample as a value.

    An exception raised in a worker process arrives with the worker's traceback in its message;
    returned as a value, it arrives with its own message of one line.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | Exception:
        return value_or_error(lambda: self.dataset[index], lambda: self.dataset.name(index))

    def __len__(self) -> int:
        return len(self.dataset)


def seeded_generator(*entropy: int) -> torch.Generator:
    """A private CPU generator whose stream depends on all the given integers."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def training_order(
    length: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    order: Sequence[int] | None = None,
) -> list[list[int]]:
    """The epoch's global batches of indices, without the incomplete last one unless wanted.

    ``order`` replaces the shuffled one; it has ``length`` indices.
    """
    if order is None:
        order = torch.randperm(length, generator=seeded_generator(seed, epoch)).tolist()
    end = length - length % batch_size if drop_last else length
    return [list(order[i : i + batch_size]) for i in range(0, end, batch_size)]


def training_loader(
    dataset: SegmentationDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    drop_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    device: torch.device | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """One epoch of training batches for one rank.

    Every global batch holds the same samples whatever the number of ranks, so one rank with the
    whole batch and several with a part each see the same data.

    Args:
        dataset: the training split; ``set_epoch(epoch)`` is called on it.
        batch_size: global; each rank takes ``batch_size / world_size`` of it.
        seed, epoch: determine the order.
        start: batches to leave out at the front (a run resumed within the epoch).
        drop_last: leave out the incomplete batch at the end.
        rank, world_size: this process among all.
        workers: loader processes, at most one for each core; 0 loads in this one.
        pin_memory: page-locked host memory.
        device: the device that trains. A GPU gets the batches, copied beside the step before; for
            others they stay on the host.
        order: the epoch's indices, instead of the shuffled ones.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``world_size``, or what a sample raised.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size: {batch_size} is not a multiple of {world_size} processes")
    dataset.set_epoch(epoch)
    share = batch_size // world_size
    batches = [
        batch[rank * share : (rank + 1) * share]
        for batch in training_order(
            len(dataset), batch_size, seed=seed, epoch=epoch, drop_last=drop_last, order=order
        )[start:]
    ]
    on_gpu = device is not None and device.type == "cuda"
    loader: DataLoader = DataLoader(
        _Carried(dataset),
        batch_sampler=batches,
        num_workers=loader_processes(workers),
        pin_memory=pin_memory or on_gpu,
        collate_fn=_stack,
        worker_init_fn=leave_to_parent,
        # Without one of its own, a loader draws its base seed from the global generator.
        generator=seeded_generator(seed, epoch, 1),
    )
    loaded = _note_unlabelled(carried(loader), dataset)
    return copied_beside(loaded, device) if device is not None and on_gpu else loaded


def copied_beside(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with their tensors on a GPU.

    They are copied on a stream of their own: the host, which is ahead of the GPU, asks for the copy
    while the step before still runs, and on the step's own stream it would come after that.

    Args:
        batches: in page-locked memory.
        device: the GPU.
    """
    beside = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(beside):
            moved = {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(beside)  # on the GPU; the host does not wait
        for value in moved.values():
            if isinstance(value, Tensor):
                value.record_stream(steps)  # so that its memory is not reused before the step ends
        yield moved


def evaluation_loader(
    dataset: SegmentationDataset,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """A split in order, each sample on exactly one rank (no sample is repeated as padding).

    Whole images differ in size, so every item is a list of batches, each with images of one size.
    """
    indices = list(range(rank, len(dataset), world_size))
    loader: DataLoader = DataLoader(
        _Carried(dataset),
        batch_sampler=[indices[i : i + batch_size] for i in range(0, len(indices), batch_size)],
        num_workers=loader_processes(workers),
        pin_memory=pin_memory,
        collate_fn=_stack_by_size,
        worker_init_fn=leave_to_parent,
        generator=seeded_generator(0),
    )
    return carried(loader)


def _note_unlabelled(batches: Iterator[Batch], dataset: SegmentationDataset) -> Iterator[Batch]:
    for batch in batches:
        if (batch["label"] == dataset.ignore_index).all():
            names = ", ".join(batch["name"][:3]) + (", ..." if len(batch["name"]) > 3 else "")
            dataset.notes.add(
                "unlabelled",
                f"{names}: no pixel of a batch has a class: all are {dataset.ignore_index}, which "
                "is ignored; see whether the masks are right with mcibi-fast data check",
            )
        yield batch


def value_or_error(read: Callable[[], Any], name: Callable[[], str]) -> Any:
    """What ``read`` returns, or as a value the error of a bad sample, or of too little memory."""
    try:
        return read()
    except (ValueError, OSError) as error:
        return error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return TooLittleMemoryError(
            f"{name()}: {memory_line(error)}; use fewer processes to load data, or smaller images"
        )


def usable_cores() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loader_processes(workers: int) -> int:
    """As many as are asked for, but at most one for each core: more of them only disturb each
    other, and PyTorch warns. What they load does not depend on their number."""
    return min(workers, usable_cores())


def carried(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loader; an error among them is raised.

    Raises TooLittleMemoryError if a process that loads data was killed.
    """
    with signals_blocked():  # while processes that load data start
        started = iter(items)
    try:
        while True:
            try:
                item = next(started)
            except StopIteration:
                return
            # OSError and EOFError are of the connection to a process that is gone: those of the
            # data arrive as items.
            except (RuntimeError, OSError, EOFError) as error:
                if isinstance(error, RuntimeError) and not is_killed_worker(error):
                    raise
                raise TooLittleMemoryError(killed_worker_line(error)) from error
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # Ends its processes now. An error's traceback would keep it for the garbage collector,
        # which closes the queues first: the processes then do not hear that they should end.
        del started


def _stack(samples: Sequence[Sample | Exception]) -> Batch | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    good: list[Sample] = list(samples)  # type: ignore[arg-type]
    return {
        "image": torch.stack([_model_input(sample) for sample in good]),
        "label": torch.stack([torch.as_tensor(sample["label"]) for sample in good]),
        "name": [sample["name"] for sample in good],
    }


def _model_input(sample: Sample) -> Tensor:
    """The image; for a clip all of its frames (h + 1, 3, H, W), the earliest first."""
    past: Tensor | None = sample.get("past")  # type: ignore[assignment]
    if past is None or not len(past):
        return sample["image"]
    return torch.cat([past.flip(0), sample["image"][None]])


def _stack_by_size(samples: Sequence[Sample | Exception]) -> list[Batch] | Exception:
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        size = (sample["image"].shape, sample["label"].shape)
        groups.setdefault(size, []).append(sample)
    return [_stack(group) for group in groups.values()]  # type: ignore[misc]
