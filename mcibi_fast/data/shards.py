"""Datasets packed into tar shards: few large files, on a local disk or behind a URL.

ROOT/<split>/index.json     classes, palette, flip pairs, mean, std, and where each sample lies
ROOT/<split>/000000.tar     00000000.image.jpg, 00000000.label.png, 00000001.image.jpg, ...

`data.packing` writes them. The tar files have WebDataset's format, whose readers stream them; here
a sample is read by its position in the file instead, so that a packed dataset is indexed like any
other: order, augmentation, shares of ranks and workers, and resuming are those of the source
dataset.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mcibi_fast import extras
from mcibi_fast.data.base import SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import (
    decode_bytes,
    decode_colours,
    fit,
    mask_indices,
)
from mcibi_fast.data.labels import check_labels
from mcibi_fast.data.reading import read_regular
from mcibi_fast.data.shard_index import FORMAT, INDEX, parse_index
from mcibi_fast.files import new_file
from mcibi_fast.limits import check_limit
from mcibi_fast.untrusted import open_regular, shorten

_OPEN_FILES = 64  # per process; the usual limit is 1024
_CHUNK = 1 << 20
_MARK = f'{{"format": "{FORMAT}"'.encode()
# Nothing that webdataset would take for a command after all, such as " pipe:..." or "Pipe://...".
_URL = re.compile(r"(?!(?i:pipe):)[A-Za-z][A-Za-z0-9+.-]*://[^\x00-\x1f\x7f]*\Z")


def shard_name(number: int) -> str:
    """A shard's file name. The index stores no names, so it cannot point to any other file."""
    return f"{number:06d}.tar"


class ShardedDataset(SegmentationDataset):
    """A split packed by `data.packing.pack`.

    Args:
        root: a folder; a URL that `webdataset.gopen` opens (http, https, gs, hf, ...); or
            "pipe:COMMAND" with {} for a path below the root, which is fetched from the command's
            output ("pipe:aws s3 cp s3://bucket/set/{} -"; a shell runs it, so trust its source).
        split: a folder under ``root``.
        transform: see `data.transforms`; None normalises and nothing else.
        cache: where shards from a URL are kept; by default mcibi_fast/shards in the user's cache
            folder. The first read of a sample fetches its shard, once per machine.

    Classes, palette, flip pairs, mean, std and ignore index are those of the packed dataset, and
    samples are equal to its samples bit for bit. Every sample has a checksum. Raises DataError with
    the file's name for a missing or broken index and for shards that are missing or have the wrong
    size (at once in a folder, when it is fetched from a URL), and with the names of shard and
    sample when a damaged sample is read. Raises ValueError when a URL needs webdataset and it is
    not installed.
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
            index = parse_index(content)
        except ValueError as error:
            place, reason = self._place(INDEX), shorten(error)
            raise DataError(
                f"{place}: not an index of shards ({reason}); pack the split again"
            ) from error
        self.classes, self.palette, self.flip_pairs = index.classes, index.palette, index.flip_pairs
        self.mean, self.std, self.ignore_index = index.mean, index.std, index.ignore_index
        self._sizes, self._names, self._rows = index.sizes, index.names, index.rows
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
        length = label_at + label_size - image_at
        check_limit("MAX_FILE_BYTES", length, f"{name}: {length:,} bytes", DataError)
        content = self._read_span(shard, image_at, length)
        if zlib.crc32(content) != checksum:
            raise DataError(
                f"{name}: damaged, the checksum is wrong; copy {self._folder / shard_name(shard)} "
                "again" + (" (delete it, and it is fetched)" if self._remote else "")
            )
        decoded = decode_colours(content[:image_size], f"{name} (image)", self.notes)
        label = mask_indices(decode_bytes(content[-label_size:], f"{name} (label)"), name)
        pixels = fit(decoded, label, f"{name} (image)", f"{name} (label)", self.notes)
        check_labels(label, self.num_classes, f"{name} (label)", self.ignore_index)
        return pixels, label.astype(np.uint8)

    def _place(self, file: str) -> str:
        """The path or URL of one of the split's files."""
        path = f"{self.split}/{file}"
        if self.root.startswith("pipe:"):
            return self.root.replace("{}", path)
        return f"{self.root.rstrip('/')}/{path}" if self._remote else str(Path(self.root) / path)

    def _read_index(self) -> bytes:
        place = self._place(INDEX)
        if self._remote:
            return b"".join(_fetch(place, lambda size: _check_index_size(place, size)))
        try:
            return read_regular(place, place, "MAX_TEXT_BYTES")
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
            return open_regular(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def _download(self, shard: int, path: Path) -> None:
        """Fetches a shard into the cache; if several processes need it, only one fetches it."""
        filelock = extras.load("mcibi_fast.data.shards", "filelock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            with new_file(path, sync=False) as file:
                for chunk in self._fetch_shard(shard, path.parent):
                    file.write(chunk)
                self._check_size(shard, file.tell())

    def _fetch_shard(self, shard: int, folder: Path) -> Iterator[bytes]:
        """A shard in pieces, no more of it than there should be and than fits into the folder."""
        place, expected = self._place(shard_name(shard)), self._sizes[shard]
        check_limit("MAX_SHARD_BYTES", expected, f"{place}: {expected:,} bytes", DataError)
        free = shutil.disk_usage(folder).free
        if expected > free:
            raise DataError(f"{place}: {expected:,} bytes, and {free:,} are free in {folder}")

        def check(size: int) -> None:
            if size > expected:
                raise DataError(f"{place}: more than the {expected:,} bytes that its index says")

        yield from _fetch(place, check)

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
    if is_command(root):
        if "{}" not in text:
            raise DataError(f"{text}: no {{}} in it, which stands for a path below the root")
        return True
    if "://" in text and not _URL.match(text):
        raise DataError(f"{text!r}: neither a URL nor a folder; a command begins with pipe:")
    return "://" in text


def is_command(root: str | Path) -> bool:
    """Whether ``root`` is a command, which a shell runs: never to be taken from a file."""
    return str(root).startswith("pipe:")


def local_splits(root: str | Path) -> list[str]:
    """The splits packed in a folder, sorted; none if it holds something else."""
    return [split for split in _index_folders(root) if _is_index(Path(root) / split / INDEX)]


def packed_folders(root: str | Path) -> list[str]:
    """The splits packed in a folder, those with a broken index among them."""
    is_other = not local_splits(root) and (Path(root) / "images").is_dir()
    return [] if is_other else _index_folders(root)


def _index_folders(root: str | Path) -> list[str]:
    found = (path.parent.name for path in Path(root).glob(f"*/{INDEX}"))
    return sorted(name for name in found if not name.startswith("."))


def holds_shards(root: str | Path) -> bool:
    """Whether ``root`` is a URL, a command, or a folder with packed splits."""
    return is_remote(root) or bool(local_splits(root))


def import_webdataset() -> ModuleType:
    """The library. Raises ImportError that says how to install it."""
    return extras.load("mcibi_fast.data.shards", "webdataset")


def _fetch(url: str, check: Callable[[int], None]) -> Iterator[bytes]:
    """Yields a URL's content in pieces; ``check`` is given the bytes so far, and may raise.

    Raises DataError when not all of it comes.
    """
    webdataset = import_webdataset()
    try:
        with webdataset.gopen(url) as stream:
            size = 0
            try:
                while chunk := stream.read(_CHUNK):
                    size += len(chunk)
                    check(size)
                    yield chunk
            except BaseException:
                _abandon(stream)
                raise
    except DataError:
        raise
    except (OSError, ValueError, ImportError) as error:
        # The library's text has the whole command in it, tokens included.
        status = re.search(r"exit -?\d+", str(error))
        reason = status[0] if status else getattr(error, "strerror", None) or str(error)
        raise DataError(f"{url}: cannot be fetched ({reason})") from None


def _abandon(stream: Any) -> None:
    """Ends the command that fetches, if any; closing would wait until it ends by itself."""
    if hasattr(stream, "proc"):
        stream.ignore_errors = True
        stream.proc.kill()


def _check_index_size(place: str, size: int) -> None:
    check_limit("MAX_TEXT_BYTES", size, f"{place}: {size:,} bytes or more", DataError)


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(len(_MARK)) == _MARK


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mcibi_fast" / "shards"
