"""Packing into shards, reading them back, from a folder and from a URL, and what can go wrong."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mcibi_fast import cli
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
from mcibi_fast.data.shards import holds_shards, local_splits
from mcibi_fast.engine.loading import evaluation_loader, training_loader
from tests.data import trees

webdataset = pytest.importorskip("webdataset", reason="needs webdataset to write shards")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("train", count=11, size=(32, 40), seed=3)


@pytest.fixture(scope="module")
def packed_scenes(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scenes in four shards or so."""
    root = tmp_path_factory.mktemp("scenes")
    assert pack(scenes, root, "train", shard_bytes=9000, progress=False).shards >= 3
    return root


@pytest.fixture
def shards(packed_scenes: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed_scenes, tmp_path / "shards"))


def assert_same(dataset: SegmentationDataset, source: SegmentationDataset) -> None:
    assert len(dataset) == len(source)
    for i in range(len(source)):
        pixels, label = dataset.read(i)
        expected, expected_label = source.read(i)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected)
        assert label.dtype == np.uint8 and np.array_equal(label, expected_label)
        assert dataset.name(i) == source.name(i)
    assert dataset.classes == list(source.classes)
    assert np.array_equal(dataset.palette, source.palette)
    assert dataset.flip_pairs == source.flip_pairs
    assert (dataset.mean, dataset.std) == (tuple(source.mean), tuple(source.std))
    assert dataset.ignore_index == source.ignore_index


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
    assert [p.name for p in tmp_path.iterdir()] == [".train.tmp"]
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


# From elsewhere


@pytest.fixture
def server(packed_scenes: Path):
    """Serves the shards; gives the URL and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    if shutil.which("curl") is None:
        pytest.skip("needs curl, which webdataset opens URLs with")
    handler = functools.partial(Handler, directory=str(packed_scenes))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_from_a_url_each_shard_is_fetched_once(
    scenes: Scenes, server, tmp_path: Path, workers: int
) -> None:
    url, asked = server
    dataset = ShardedDataset(f"{url}/", "train", cache=tmp_path)
    assert asked == ["/train/index.json"]
    names = [
        name
        for groups in evaluation_loader(dataset, workers=workers)
        for batch in groups
        for name in batch["name"]
    ]
    assert names == [scenes.name(i) for i in range(11)]
    assert_same(dataset, scenes)
    shards = [path for path in asked if path.endswith(".tar")]
    assert len(shards) == len(set(shards)) >= 3
    assert_same(ShardedDataset(url, "train", cache=tmp_path), scenes)
    assert [path for path in asked if path.endswith(".tar")] == shards
    assert not list(tmp_path.rglob("*.tmp"))


def test_from_a_command(scenes: Scenes, packed_scenes: Path, tmp_path: Path) -> None:
    assert_same(ShardedDataset(f"pipe:cat {packed_scenes}/{{}}", "train", cache=tmp_path), scenes)
    with pytest.raises(DataError, match=r"no \{\} in it"):
        ShardedDataset("pipe:cat index.json", "train")


def test_what_cannot_be_fetched(server, packed_scenes: Path, tmp_path: Path) -> None:
    url, _ = server
    with pytest.raises(DataError, match=r"/val/index.json: cannot be fetched \(exit 22\)"):
        ShardedDataset(url, "val", cache=tmp_path)
    with pytest.raises(DataError, match=r"s3://bucket/train/index.json: cannot be fetched"):
        ShardedDataset("s3://bucket", "train", cache=tmp_path)
    # Half of a shard comes, and the command says that all is well.
    command = f"pipe:case {{}} in *.tar) head -c 900;; *) cat;; esac < {packed_scenes}/{{}}"
    dataset = ShardedDataset(command, "train", cache=tmp_path)
    with pytest.raises(DataError, match=r"000000.tar: 900 bytes, expected"):
        dataset.read(0)
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("*.tmp"))


def test_another_packing_has_a_cache_of_its_own(tmp_path: Path) -> None:
    command, sources = f"pipe:cat {tmp_path}/shards/{{}}", []
    for seed in range(2):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(tmp_path / "shards")
        sources.append(Scenes("train", count=3, size=16, seed=seed))
        pack(sources[-1], tmp_path / "shards", "train", progress=False)
        dataset = ShardedDataset(command, "train", cache=tmp_path / "cache")
        assert_same(dataset, sources[-1])


def test_without_webdataset(
    scenes: Scenes, packed_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for needs in (
        lambda: pack(scenes, tmp_path / "out", "train", progress=False),
        lambda: ShardedDataset("http://127.0.0.1:1", "train", cache=tmp_path),
    ):
        with pytest.raises(ValueError, match=r"webdataset .*pip install 'mcibi-fast\[streaming\]'"):
            needs()
    assert list(tmp_path.iterdir()) == []
    # Shards in a folder are read without it.
    assert_same(ShardedDataset(packed_scenes, "train"), scenes)


# The command line


def test_pack_and_check(tree: Path, tmp_path_factory, capsys) -> None:
    out = tmp_path_factory.mktemp("out")
    assert cli.main(["data", "pack", str(tree), str(out / "s"), "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("s/train  3 images, 1 shard, 0 MB") and "s/val  1 image" in lines[1]
    assert_same(ShardedDataset(out / "s", "val"), FolderDataset(tree, "val"))
    assert cli.main(["data", "check", str(out / "s"), "--out", str(out / "check")]) == 0
    text = capsys.readouterr().out
    assert "train 3, val 1" in text and "24x16 (4)" in text and "no problems" in text
    assert len(list((out / "check").iterdir())) == 4


def test_pack_a_published_dataset(tmp_path: Path, capsys) -> None:
    root = trees.lip(tmp_path / "lip")
    arguments = ["lip", str(root), str(tmp_path / "s"), "--split", "val", "--shard-size", "1"]
    assert cli.main(["data", "pack", *arguments, "--workers", "0", "--quiet"]) == 0
    assert local_splits(tmp_path / "s") == ["val"]
    assert_same(ShardedDataset(tmp_path / "s", "val"), LIP(root, "val"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ROOT"], "expected [NAME] ROOT OUT"),
        (["ROOT", "OUT", "--split", "test"], "no split 'test'"),
        (["ROOT", "OUT", "--shard-size", "0"], "--shard-size must be at least 1"),
        (["lip", "ROOT", "OUT", "--classes", "a,b"], "--classes: a published dataset has its own"),
        (["nosuch", "ROOT", "OUT"], "no dataset 'nosuch'"),
    ],
)
def test_bad_arguments(tree: Path, tmp_path_factory, capsys, arguments, message) -> None:
    out = tmp_path_factory.mktemp("out")
    places = {"ROOT": str(tree), "OUT": str(out / "s")}
    assert cli.main(["data", "pack", *(places.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(out.iterdir()) == []
