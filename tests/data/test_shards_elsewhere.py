"""Shards behind a URL or a command, and on the command line."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

import pytest

from mcibi_fast import cli
from mcibi_fast.data import (
    LIP,
    DataError,
    FolderDataset,
    Scenes,
    ShardedDataset,
    pack,
)
from mcibi_fast.data.loading import evaluation_loader
from mcibi_fast.data.shards import local_splits
from tests.data import trees
from tests.data.packed import assert_same

webdataset = pytest.importorskip("webdataset", reason="needs webdataset to write shards")


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
        with pytest.raises(ValueError, match=r'webdataset: pip install "mcibi-fast\[streaming\]"'):
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
