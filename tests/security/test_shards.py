"""Packed datasets whose index or shards ask for more than they are."""

from __future__ import annotations

import http.server
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import DataError, ShardedDataset, check_shards
from mcibi_fast.data.shards import holds_shards, is_command, is_remote, local_splits
from tests.security import attacks, places
from tests.security.forked import bounded, refused

PICTURE = attacks.png(24, 16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return places.shards(tmp_path / "shards", PICTURE, PICTURE)


def sample(**values: Any) -> Callable[[dict], None]:
    """Changes entries of the index's only sample."""
    columns = ("name", "shard", "image_at", "image_size", "label_at", "label_size", "checksum")

    def change(index: dict) -> None:
        for key, value in values.items():
            index["samples"][0][columns.index(key)] = value

    return change


def entry(key: str, value: Any) -> Callable[[dict], None]:
    return lambda index: index.update({key: value})


SIZE = len(PICTURE)
OUTSIDE = "samples: one that does not lie in its shard"
INDICES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "shard 10^8": (sample(shard=10**8), "samples: one in shard 100000000 of 1"),
    "shard 10^12": (sample(shard=10**12), "samples: one in shard 1000000000000 of 1"),
    "shard 10^30": (sample(shard=10**30), "samples: expected whole numbers from 0"),
    "shard below 0": (sample(shard=-1), "samples: expected whole numbers from 0"),
    "image at 10^12": (sample(image_at=10**12), OUTSIDE),
    "image of 10^12": (sample(image_size=10**12), OUTSIDE),
    "image of nothing": (sample(image_size=0), OUTSIDE),
    "image into the label": (sample(image_size=SIZE + 1), OUTSIDE),
    "label at 10^18": (sample(label_at=10**18), OUTSIDE),
    "label of 10^12": (sample(label_size=10**12), OUTSIDE),
    "label of nothing": (sample(label_size=0), OUTSIDE),
    "sums beyond int64": (sample(label_at=2**62 - 1, label_size=2**62 - 1), OUTSIDE),
    "numbers beyond int64": (sample(label_at=2**63, label_size=2**63), "expected whole numbers"),
    "label before image": (sample(image_at=SIZE, label_at=0), OUTSIDE),
    "a fraction": (sample(image_at=0.5), "samples: expected whole numbers"),
    "a truth": (sample(image_at=True), "samples: expected whole numbers"),
    "a text": (sample(image_at="0"), "samples: expected whole numbers"),
    "a list": (sample(image_at=[0]), "samples: expected whole numbers"),
    "not a number": (sample(image_at=math.nan), "samples: expected whole numbers"),
    "no name": (sample(name=None), "samples: a NoneType, expected a str"),
    "a long name": (sample(name="x" * 10**6), "samples: a name of more than 1024 characters"),
    "a long sample": (lambda index: index["samples"][0].append(1), "lists of 6 numbers"),
    "an empty sample": (entry("samples", [[]]), "samples: a NoneType, expected a str"),
    "a sample that is none": (entry("samples", [3]), "samples: a int, expected a list"),
    "samples that are none": (entry("samples", {"a": 1}), "samples: a dict, expected a list"),
    "no samples": (lambda index: index.pop("samples"), "no samples"),
    "samples of other shards": (entry("shards", [{"samples": 2, "bytes": 2 * SIZE}]), "counts"),
    "10^12 samples": (entry("shards", [{"samples": 10**12, "bytes": 2 * SIZE}]), "counts"),
    "bytes below 0": (entry("shards", [{"samples": 1, "bytes": -1}]), "shards.bytes: expected"),
    "no bytes": (entry("shards", [{"samples": 1}]), "shards.bytes: expected"),
    "a shard that is none": (entry("shards", [1]), "shards: a int, expected a dict"),
    "no classes": (entry("classes", []), "0 classes; 1 to 255 are possible"),
    "256 classes": (entry("classes", ["x"] * 256), "256 classes; 1 to 255 are possible"),
    "classes that are none": (entry("classes", "abc"), "classes: a str, expected a list"),
    "numbers for names": (entry("classes", [1, 2, 3]), "classes: a name that is no text"),
    "long names": (entry("classes", ["x" * 10**6, "y", "z"]), "classes: a name that is no text"),
    "few colours": (entry("palette", [[1, 2, 3]]), "palette: 1 colours of 3 classes"),
    "bright colours": (entry("palette", [[1, 2, 256]] * 3), "palette: expected whole numbers"),
    "a palette of lists": (entry("palette", [[[]] * 3] * 3), "palette: expected whole numbers"),
    "pairs of no classes": (entry("flip_pairs", [[0, 3]]), "flip_pairs: expected whole numbers"),
    "pairs of three": (entry("flip_pairs", [[0, 1, 2]]), "flip_pairs: expected lists of 2"),
    "mean of 10^400": (entry("mean", [10**400, 0, 0]), "mean: expected three numbers"),
    "mean of infinity": (entry("mean", [math.inf, 0, 0]), "mean: expected three numbers"),
    "std of nan": (entry("std", [math.nan, 1, 1]), "std: expected three numbers"),
    "std of four": (entry("std", [1, 1, 1, 1]), "std: expected three numbers"),
    "ignore 10^12": (entry("ignore_index", 10**12), "ignore_index: expected whole numbers"),
    "another format": (entry("format", ["x"] * 10**6), "format: expected 'mcibi_fast shards 1'"),
}


@pytest.mark.parametrize("attack", INDICES)
def test_an_index_that_leads_elsewhere(root: Path, attack: str) -> None:
    change, message = INDICES[attack]
    path = root / "val/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    outcome = bounded(lambda: ShardedDataset(root, "val").read(0) and None, megabytes=60)
    assert outcome.error.startswith("DataError: ") and "index.json: not an index" in outcome.error
    assert message in outcome.error and len(outcome.error) < 600, outcome.error
    if local_splits(root):  # it still begins as an index does
        error = refused("data", "check", root, "--out", root / "out", "--quiet", megabytes=60)
        assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": "mcibi_fast shards 1", "x": ' + b'{"a":' * 100_000, "nested too deeply"),
        (b"null", "a NoneType, expected a dict"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"1" * 5000, "4300"),
        (b'{"format": "mcibi_fast shards 1"}', "no classes"),
    ],
)
def test_an_index_that_is_none(root: Path, content: bytes, message: str) -> None:
    (root / "val/index.json").write_bytes(content)
    error = bounded(ShardedDataset, root, "val", megabytes=60).error
    assert error.startswith("DataError: ") and message in error and "\n" not in error


@pytest.mark.parametrize("file", ["index.json", "000000.tar"])
@pytest.mark.parametrize("kind", ["fifo", "endless", "terabyte"])
def test_files_that_never_end(root: Path, file: str, kind: str) -> None:
    make, reason = attacks.NO_IMAGES[kind]
    (root / "val" / file).unlink()
    make(root / "val" / file)
    error = bounded(lambda: ShardedDataset(root, "val").read(0) and None, megabytes=60).error
    assert error.startswith("DataError: ") and file in error
    if file == "index.json":
        assert reason.replace("MAX_FILE_BYTES", "MAX_TEXT_BYTES") in error
        assert bounded(holds_shards, root).value is False
        refused("data", "check", root, "--out", root / "out", "--quiet")
    else:
        assert "expected" in error


def test_a_shard_that_becomes_a_fifo(root: Path) -> None:
    dataset = ShardedDataset(root, "val")
    (root / "val/000000.tar").unlink()
    os.mkfifo(root / "val/000000.tar")
    error = bounded(dataset.read, 0).error
    assert error.startswith("DataError: ") and "a FIFO, not a regular file" in error


def test_a_large_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIBI_FAST_MAX_FILE_BYTES", str(2 * SIZE - 1))
    with pytest.raises(DataError, match=rf"sample a: {2 * SIZE:,} bytes, more than MAX_FILE_BYTES"):
        ShardedDataset(root, "val").read(0)


def test_labels_of_no_class(tmp_path: Path) -> None:
    """Checksums hold, but the labels are for other classes; kernels index by them."""
    Image.fromarray(np.full((16, 24), 7, np.uint8)).save(tmp_path / "label.png")
    label = (tmp_path / "label.png").read_bytes()
    dataset = ShardedDataset(places.shards(tmp_path / "shards", PICTURE, label), "val")
    with pytest.raises(DataError, match=r"sample a \(label\): label 7 with 3 classes"):
        dataset.read(0)


def test_many_samples_in_one_place(root: Path) -> None:
    """An index may name a place a hundred thousand times; that takes what its text takes."""
    path = root / "val/index.json"
    index = json.loads(path.read_text())
    index["samples"] *= 100_000
    index["shards"][0]["samples"] = 100_000
    path.write_text(json.dumps(index))
    assert bounded(lambda: len(ShardedDataset(root, "val")), megabytes=200).value == 100_000


@pytest.mark.parametrize("name", ["../../../x", "/etc/x", "a\0b", "\x1b[2J", "x" * 1000, "..", ""])
def test_names_of_samples_name_no_files(root: Path, tmp_path: Path, name: str) -> None:
    """Sample names become part of the overlays' file names."""
    path = root / "val/index.json"
    index = json.loads(path.read_text())
    index["samples"][0][0] = name
    path.write_text(json.dumps(index))
    out = tmp_path / "a/b/out"
    report = check_shards(root, out, progress=False)
    assert report.ok and len(report.overlays) == 1
    assert [p.parent for p in tmp_path.rglob("*.png")] == [out]
    assert all(c.isprintable() for c in report.overlays[0].name)


# Elsewhere


class Endless(http.server.BaseHTTPRequestHandler):
    """Sends a good index; zeros for a shard, and for the index of another split."""

    index = b""
    sent = 0

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path == "/val/index.json":
            self.wfile.write(self.index)
            return
        try:
            while Endless.sent < 10**10:
                self.wfile.write(bytes(1 << 20))
                Endless.sent += 1 << 20
            time.sleep(600)
        except OSError:  # nobody listens any more
            pass


@pytest.fixture
def server(root: Path) -> Iterator[str]:
    if shutil.which("curl") is None:
        pytest.skip("needs curl, which webdataset opens URLs with")
    Endless.index, Endless.sent = (root / "val/index.json").read_bytes(), 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_shard_that_never_ends(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    dataset = bounded(
        lambda: ShardedDataset(server, "val", cache=cache).read(0) and None, megabytes=100
    )
    expected = rf"000000.tar: more than the {2 * SIZE:,} bytes that its index says"
    assert dataset.error.startswith("DataError: ") and expected in dataset.error
    assert Endless.sent < 100e6
    assert not [p for p in cache.rglob("*") if p.is_file() and p.stat().st_size]


def test_an_index_that_never_ends(server: str, tmp_path: Path) -> None:
    outcome = bounded(ShardedDataset, server, "other", cache=tmp_path / "cache", megabytes=200)
    assert "other/index.json: " in outcome.error
    assert "bytes or more, more than MAX_TEXT_BYTES" in outcome.error
    assert Endless.sent < 200e6


def test_a_command_that_never_ends(root: Path, tmp_path: Path) -> None:
    """The command is ended, although it does not notice that nobody reads its output."""
    command = f"pipe:case {{}} in *.json) cat {root}/{{}};; *) trap '' PIPE; cat /dev/zero;; esac"
    read = lambda: ShardedDataset(command, "val", cache=tmp_path / "cache").read(0) and None  # noqa: E731
    assert "more than the" in bounded(read, megabytes=100).error


@pytest.mark.parametrize(
    ("size", "message"), [(1 << 35, "more than MAX_SHARD_BYTES"), (1 << 34, "are free in")]
)
def test_a_shard_that_does_not_fit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, message: str
) -> None:
    path = root / "val/index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["bytes"] = size
    path.write_text(json.dumps(index))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    dataset = ShardedDataset(f"pipe:cat {root}/{{}}", "val", cache=tmp_path / "cache")
    with pytest.raises(DataError, match=message):
        dataset.read(0)


@pytest.mark.parametrize(
    "text",
    ["PIPE://touch x; {}", " pipe://touch x; {}", "\tpipe:touch x://{}", "a b://c", "pi\npe://x"],
)
def test_only_pipe_is_a_command(tmp_path: Path, text: str) -> None:
    """webdataset takes some of these for commands as well."""
    assert not is_command(text)
    for use in (is_remote, holds_shards, lambda root: ShardedDataset(root, "val")):
        with pytest.raises(
            DataError, match="neither a URL nor a folder; a command begins with pipe:"
        ):
            use(text)


def test_commands() -> None:
    assert is_command("pipe:cat {}") and is_remote("pipe:cat {}")
    for url in ("http://x", "https://x/a b", "file:///a b", "hf://datasets/x", "s3://b"):
        assert is_remote(url) and not is_command(url)
    assert not is_remote("folder") and not is_remote(Path("pipe"))


def test_the_index_of_the_tests_is_good(root: Path) -> None:
    image, label = ShardedDataset(root, "val").read(0)
    assert image.shape == (16, 24, 3) and not label.any()
