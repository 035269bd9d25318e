"""Datasets packed into tar shards: few large files, on a local disk or behind a URL.

ROOT/<split>/index.json     classes, palette, flip pairs, mean, std, and where each sample lies
ROOT/<split>/000000.tar     00000000.image.jpg, 00000000.label.png, 00000001.image.jpg, ...

`data.packing` writes them. The tar files are WebDataset's, and its readers stream them; here a
sample is read by its place in the file instead, so that a packed dataset is indexed like any other:
order, augmentation, shares of ranks and workers, and resuming are those of the source dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mcibi_fast import extras
from mcibi_fast.data.base import SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import check_sizes, decode_bytes, mask_indices
from mcibi_fast.files import new_file

INDEX = "index.json"
FORMAT = "mcibi_fast shards 1"

_OPEN_FILES = 64  # per process; the usual limit is 1024
_CHUNK = 1 << 20
_MARK = f'{{"format": "{FORMAT}"'.encode()


def shard_name(number: int) -> str:
    """A shard's file name. Names are not stored: an index from elsewhere can name no other file."""
    return f"{number:06d}.tar"


class ShardedDataset(SegmentationDataset):
    """A split packed by `data.packing.pack`.

    Args:
        root: a folder; a URL that `webdataset.gopen` opens (http, https, gs, hf, ...); or
            "pipe:COMMAND" with {} for a path below the root, which is fetched from the command's
            output ("pipe:aws s3 cp s3://bucket/set/{} -"; a shell runs it, so trust its source).
        split: a folder under ``root``.
        transform: see `data.transforms`; None normalises and nothing else.
        cache: where shards from a URL are kept; default mcibi_fast/shards in the user's cache
            folder. The first read of any of a shard's samples fetches the shard, once per machine.

    Classes, palette, flip pairs, mean, std and ignore index are the packed dataset's, and samples
    have its bits. Every sample has a checksum. Raises DataError, naming the file, for a missing or
    broken index and for missing shards or those of the wrong size, at once in a folder and when
    fetched from a URL; naming shard and sample, when a sample is read that is damaged. Raises
    ValueError when a URL needs webdataset and it is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        *,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(transform)
        check_split(split)
        self.root, self.split = str(root), split
        self._remote = is_remote(self.root)
        content = self._read_index()
        try:
            self._parse(json.loads(content))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{self._place(INDEX)}: not an index of shards ({error!r}); pack the split again"
            ) from error
        if self._remote:
            # Named after the index, the cache never mixes two packings of one dataset.
            folder = Path(cache).expanduser() if cache else _user_cache()
            self._folder = folder / f"{split}-{hashlib.sha256(content).hexdigest()[:16]}"
        else:
            self._folder = Path(self.root) / split
            for number in range(len(self._sizes)):
                try:
                    size = (self._folder / shard_name(number)).stat().st_size
                except OSError as error:
                    place = self._place(shard_name(number))
                    raise DataError(f"{place}: {error.strerror}; copy the shard again") from error
                self._check_size(number, size)
        self._opened: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        shard, image_at, image_size, label_at, label_size, checksum = self._rows[index].tolist()
        name = f"{self.split}/{shard_name(shard)}: sample {self._names[index]}"
        content = self._read_span(shard, image_at, label_at + label_size - image_at)
        if zlib.crc32(content) != checksum:
            raise DataError(
                f"{name}: damaged, the checksum is wrong; copy {self._folder / shard_name(shard)} "
                "again" + (" (delete it, and it is fetched)" if self._remote else "")
            )
        pixels = np.array(decode_bytes(content[:image_size], f"{name} (image)").convert("RGB"))
        label = mask_indices(decode_bytes(content[-label_size:], f"{name} (label)"), name)
        check_sizes(pixels, label, f"{name} (image)", f"{name} (label)")
        return pixels, label

    def _parse(self, index: dict[str, Any]) -> None:
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r}, expected {FORMAT!r}")
        self.classes = list(index["classes"])
        self.palette = np.array(index["palette"], np.uint8).reshape(len(self.classes), 3)
        self.flip_pairs = tuple((int(left), int(right)) for left, right in index["flip_pairs"])
        self.mean, self.std = tuple(index["mean"]), tuple(index["std"])
        self.ignore_index = int(index["ignore_index"])
        self._sizes = [int(shard["bytes"]) for shard in index["shards"]]
        self._names = [str(entry[0]) for entry in index["samples"]]
        # shard, image at, image's bytes, label at, label's bytes, checksum of image to label
        self._rows = np.array([entry[1:] for entry in index["samples"]], np.int64).reshape(-1, 6)
        counts = np.bincount(self._rows[:, 0], minlength=len(self._sizes))
        if counts.tolist() != [int(shard["samples"]) for shard in index["shards"]]:
            raise ValueError("the shards' counts are not those of the samples")

    def _place(self, file: str) -> str:
        """The path or URL of one of the split's files."""
        path = f"{self.split}/{file}"
        if self.root.startswith("pipe:"):
            return self.root.replace("{}", path)
        return f"{self.root.rstrip('/')}/{path}" if self._remote else str(Path(self.root) / path)

    def _read_index(self) -> bytes:
        place = self._place(INDEX)
        if self._remote:
            return b"".join(_fetch(place))
        try:
            return Path(place).read_bytes()
        except FileNotFoundError as error:
            there = ", ".join(local_splits(self.root)) or "no split"
            raise DataError(f"{place}: missing; packed in {self.root}: {there}") from error
        except OSError as error:
            raise DataError(f"{place}: cannot be read ({error.strerror})") from error

    def _read_span(self, shard: int, start: int, length: int) -> bytes:
        file = self._opened.pop(shard, None) or self._open(shard)
        self._opened[shard] = file  # the last is the one used last
        if len(self._opened) > _OPEN_FILES:
            self._opened.popitem(last=False)[1].close()
        try:
            # Unlike seek and read, right in workers that inherit the open file.
            return os.pread(file.fileno(), length, start)
        except OSError as error:
            name = self._folder / shard_name(shard)
            raise DataError(f"{name}: cannot be read ({error.strerror})") from error

    def _open(self, shard: int) -> BinaryIO:
        path = self._folder / shard_name(shard)
        if self._remote and not path.exists():
            self._download(shard, path)
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def _download(self, shard: int, path: Path) -> None:
        """Fetches a shard into the cache; of the processes that want it, one does."""
        filelock = extras.load("mcibi_fast.data.shards", "filelock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            with new_file(path, sync=False) as file:
                for chunk in _fetch(self._place(path.name)):
                    file.write(chunk)
                self._check_size(shard, file.tell())

    def _check_size(self, shard: int, size: int) -> None:
        place, expected = self._place(shard_name(shard)), self._sizes[shard]
        if size != expected:
            raise DataError(f"{place}: {size:,} bytes, expected {expected:,}; copy the shard again")


def check_split(split: str) -> None:
    """Raises DataError for a split's name that is no plain folder name."""
    # It goes into paths, URLs and shell commands.
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"split: {split!r}; letters, digits, '_', '-' and '.' are possible")


def is_remote(root: str | Path) -> bool:
    """Whether ``root`` is a URL or a command rather than a folder. Raises DataError without {}."""
    text = str(root)
    if text.startswith("pipe:"):
        if "{}" not in text:
            raise DataError(f"{text}: no {{}} in it, which stands for a path below the root")
        return True
    return "://" in text


def local_splits(root: str | Path) -> list[str]:
    """The splits packed in a folder, sorted; none where it holds something else."""
    found = (path for path in Path(root).glob(f"*/{INDEX}") if not path.parent.name.startswith("."))
    return sorted(path.parent.name for path in found if _is_index(path))


def holds_shards(root: str | Path) -> bool:
    """Whether ``root`` is a URL, a command, or a folder with packed splits."""
    return is_remote(root) or bool(local_splits(root))


def import_webdataset() -> ModuleType:
    """The library. Raises ImportError that says how to install it."""
    return extras.load("mcibi_fast.data.shards", "webdataset")


def _fetch(url: str) -> Any:
    """Yields a URL's content in pieces. Raises DataError when not all of it comes."""
    webdataset = import_webdataset()
    try:
        with webdataset.gopen(url) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (OSError, ValueError, ImportError) as error:
        # The library's text has the whole command in it, tokens included.
        status = re.search(r"exit -?\d+", str(error))
        reason = status[0] if status else getattr(error, "strerror", None) or str(error)
        raise DataError(f"{url}: cannot be fetched ({reason})") from None


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mcibi_fast" / "shards"
