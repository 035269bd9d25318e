"""Packing into shards, reading them back, and what can go wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mcibi_fast.data import (
    LIP,
    DataError,
    FolderDataset,
    Scenes,
    SegmentationDataset,
    ShardedDataset,
    TrainTransform,
    check_shards,
    pack,
)
from mcibi_fast.data.loading import evaluation_loader, training_loader
from mcibi_fast.data.shards import holds_shards, local_splits
from tests.data import trees
from tests.data.packed import assert_same

webdataset = pytest.importorskip("webdataset", reason="needs webdataset to write shards")


def test_scenes_come_back_bit_for_bit(scenes: Scenes, packed_scenes: Path) -> None:
    dataset = ShardedDataset(packed_scenes, "train")
    assert_same(dataset, scenes)
    sample, expected = dataset[5], scenes[5]
    assert torch.equal(sample["image"], expected["image"])
    assert torch.equal(sample["label"], expected["label"])


def test_a_folder_keeps_its_image_files(tree: Path, tmp_path: Path) -> None:
    source = FolderDataset(tree, "train")
    done = pack(source, tmp_path / "out", "train", progress=False)
    assert (done.samples, done.shards) == (3, 1)
    assert_same(ShardedDataset(tmp_path / "out", "train"), source)
    with tarfile.open(done.path / "000000.tar") as tar:
        names = tar.getnames()
        contents = [tar.extractfile(name).read() for name in names if "image" in name]
    assert names[::2] == ["00000000.image.jpg", "00000001.image.png", "00000002.image.jpeg"]
    assert names[1::2] == [f"{i:08d}.label.png" for i in range(3)]
    files = ["a.jpg", "b.png", "c.JPEG"]
    assert contents == [(tree / "images/train" / name).read_bytes() for name in files]


def test_a_published_dataset_is_packed_as_classes(tmp_path: Path) -> None:
    source = LIP(trees.lip(tmp_path / "lip"), "train")
    done = pack(source, tmp_path / "out", "train", progress=False)
    dataset = ShardedDataset(tmp_path / "out", "train")
    assert dataset.flip_pairs and dataset.name(0) == "77_471474"
    assert_same(dataset, source)
    assert b"\xff\xd8" in (done.path / "000000.tar").read_bytes()[512:514]


def test_an_image_file_that_is_not_what_the_dataset_gives_is_not_packed(
    tree: Path, tmp_path: Path
) -> None:
    class Dark(FolderDataset):
        def read(self, index):
            pixels, label = super().read(index)
            return pixels // 2, label

    pack(Dark(tree, "train"), tmp_path / "out", "train", progress=False)
    assert_same(ShardedDataset(tmp_path / "out", "train"), Dark(tree, "train"))


def test_webdataset_reads_the_shards_as_well(scenes: Scenes, packed_scenes: Path) -> None:
    paths = [str(path) for path in sorted(packed_scenes.glob("train/*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(len(scenes))]
    for i, sample in enumerate(samples):
        pixels, label = scenes.read(i)
        assert np.array_equal(sample["image.png"], pixels)
        assert np.array_equal(sample["label.png"][..., 0], label)


def test_same_bytes_for_any_number_of_workers(
    scenes: Scenes, packed_scenes: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    pack(scenes, tmp_path, "train", shard_bytes=9000, workers=2, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    files = sorted(p.name for p in (packed_scenes / "train").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "train").iterdir())
    for name in files:
        expected = (packed_scenes / "train" / name).read_bytes()
        assert (tmp_path / "train" / name).read_bytes() == expected


def test_shards_hold_what_they_may(scenes: Scenes, packed_scenes: Path, tmp_path: Path) -> None:
    index = json.loads((packed_scenes / "train" / "index.json").read_text())
    sizes = [[row[3] + row[5] for row in index["samples"] if row[1] == n] for n in range(2)]
    assert sum(sizes[0]) <= 9000 < sum(sizes[0]) + sizes[1][0]
    done = pack(scenes, tmp_path, "train", shard_bytes=1, progress=False)
    assert done.shards == done.samples == 11


# Order, shares, augmentation


def test_every_sample_once_over_ranks_and_workers(scenes: Scenes, packed_scenes: Path) -> None:
    dataset = ShardedDataset(packed_scenes, "train")
    seen: Counter[str] = Counter()
    for rank in range(3):
        for groups in evaluation_loader(dataset, batch_size=2, rank=rank, world_size=3, workers=2):
            seen.update(name for batch in groups for name in batch["name"])
    assert seen == Counter(scenes.name(i) for i in range(11))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_source_datasets(
    scenes: Scenes, packed_scenes: Path, workers: int
) -> None:
    def batches(dataset: SegmentationDataset, rank: int, workers: int) -> list:
        dataset.transform = TrainTransform(
            (24, 24), mean=scenes.mean, std=scenes.std, seed=1, ignore_index=255
        )
        return list(
            training_loader(
                dataset, batch_size=4, seed=1, epoch=2, rank=rank, world_size=2, workers=workers
            )
        )

    source = Scenes("train", count=11, size=(32, 40), seed=3)
    dataset = ShardedDataset(packed_scenes, "train")
    seen: list[str] = []
    for rank in range(2):
        got, expected = batches(dataset, rank, workers), batches(source, rank, 0)
        assert len(got) == len(expected) == 2
        for batch, other in zip(got, expected, strict=True):
            assert batch["name"] == other["name"]
            assert torch.equal(batch["image"], other["image"])
            assert torch.equal(batch["label"], other["label"])
            seen += batch["name"]
    assert len(set(seen)) == 8


def test_workers_can_share_an_open_file(packed_scenes: Path) -> None:
    dataset = ShardedDataset(packed_scenes, "train")
    dataset.read(0)
    dataset.read(1)
    (file,) = dataset._opened.values()
    assert file.tell() == 0  # the position, which forked workers have in common, is never moved


def test_pickles_without_its_open_files(scenes: Scenes, packed_scenes: Path) -> None:
    dataset = ShardedDataset(packed_scenes, "train")
    dataset.read(0)
    assert_same(pickle.loads(pickle.dumps(dataset)), scenes)


def test_few_files_stay_open(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcibi_fast.data.shards._OPEN_FILES", 3)
    pack(scenes, tmp_path, "train", shard_bytes=1, progress=False)
    dataset = ShardedDataset(tmp_path, "train")
    before = len(os.listdir("/proc/self/fd"))
    assert_same(dataset, scenes)
    assert_same(dataset, scenes)
    assert len(os.listdir("/proc/self/fd")) == before + 3


# Writing: whole or not at all


def test_refuses_to_overwrite(scenes: Scenes, shards: Path) -> None:
    with pytest.raises(DataError, match=r"shards/train: already there; remove it"):
        pack(scenes, shards, "train", progress=False)
    assert_same(ShardedDataset(shards, "train"), scenes)


class Stopping(Scenes):
    """Fails at the sixth sample."""

    def __init__(self, stop) -> None:
        super().__init__("train", count=11, size=32, seed=0)
        self.stop = stop

    def read(self, index):
        if index == 5:
            self.stop()
        return super().read(index)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(Stopping(interrupt), tmp_path, "train", shard_bytes=5000, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_shard_that_looks_whole(tmp_path: Path) -> None:
    dataset = Stopping(lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=pack, args=(dataset, tmp_path, "train"), kwargs={"shard_bytes": 5000}
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".mcibi_fast-")
    assert len(list(tmp_path.rglob("*.tar"))) > 1
    assert not holds_shards(tmp_path) and local_splits(tmp_path) == []
    dataset.stop = lambda: None
    pack(dataset, tmp_path, "train", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_the_packing(tree: Path, tmp_path: Path, workers: int) -> None:
    (tree / "images/train/b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^images/train/b.png: cannot be decoded") as error:
        out = tmp_path / "out"
        pack(FolderDataset(tree, "train"), out, "train", workers=workers, progress=False)
    assert "\n" not in str(error.value)
    assert list(out.iterdir()) == []


def test_a_full_disk_is_named(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*train"):
        pack(scenes, tmp_path, "train", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["", "../train", "a/b", "a;b", ".hidden"])
def test_a_split_is_a_plain_name(scenes: Scenes, tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="split: "):
        pack(scenes, tmp_path, split, progress=False)
    with pytest.raises(DataError, match="split: "):
        ShardedDataset(tmp_path, split)


def test_shows_progress(scenes: Scenes, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    pack(scenes, tmp_path, "train")
    assert "pack train: 100%" in capsys.readouterr().err


# Reading what is not whole


def test_a_missing_shard(shards: Path) -> None:
    (shards / "train/000001.tar").unlink()
    with pytest.raises(DataError, match=r"train/000001.tar: No such file.*copy the shard again"):
        ShardedDataset(shards, "train")


def test_a_shard_cut_short(shards: Path) -> None:
    path = shards / "train/000001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 512)
    with pytest.raises(DataError, match=rf"000001.tar: {size - 512:,} bytes, expected {size:,}"):
        ShardedDataset(shards, "train")


def test_a_shard_lost_while_reading(shards: Path) -> None:
    dataset = ShardedDataset(shards, "train")
    shutil.rmtree(shards / "train")
    with pytest.raises(DataError, match=r"train/000000.tar: cannot be read \(No such file"):
        dataset.read(0)


@pytest.mark.parametrize("part", ["image", "label"])
def test_a_damaged_sample_names_shard_and_sample(shards: Path, part: str) -> None:
    row = json.loads((shards / "train/index.json").read_text())["samples"][7]
    path = shards / "train" / f"{row[1]:06d}.tar"
    content = bytearray(path.read_bytes())
    content[{"image": row[2] + row[3] // 2, "label": row[4] + row[5] // 2}[part]] ^= 1
    path.write_bytes(content)
    dataset = ShardedDataset(shards, "train")
    dataset.read(6)
    with pytest.raises(DataError, match=rf"train/{path.name}: sample train_00007: damaged"):
        dataset.read(7)
    # From a worker, too, as one line.
    with pytest.raises(DataError, match=r"^train/.*: sample train_00007: damaged") as error:
        list(evaluation_loader(dataset, workers=1))
    assert "\n" not in str(error.value)
    report = check_shards(shards, progress=False)
    assert len(report.problems) == 1 and "train_00007" in report.problems[0]
    assert report.pairs == {"train": 10}


def test_no_index(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"val/index.json: missing; packed in .*: train$"):
        ShardedDataset(shards, "val")
    with pytest.raises(DataError, match=r"missing; packed in .*: no split$"):
        ShardedDataset(tmp_path / "nothing", "val")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format="other"),
        lambda index: index.pop("classes"),
        lambda index: index["samples"].pop(),
        lambda index: index["samples"][0].pop(),
        lambda index: index["shards"].pop(),
        lambda index: index.update(palette=[[1, 2, 3]]),
    ],
)
def test_a_broken_index(shards: Path, change) -> None:
    path = shards / "train/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index.json: not an index of shards .*pack the split"):
        ShardedDataset(shards, "train")
