"""Pack a dataset into shards: `mcibi-fast data pack [NAME] ROOT OUT`; see `data.shards`."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mcibi_fast.data.base import SegmentationDataset
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import FolderDataset
from mcibi_fast.data.images import decode_pixels, read_image_file
from mcibi_fast.data.listed import ListedDataset
from mcibi_fast.data.loading import carried, loader_processes, value_or_error
from mcibi_fast.data.shard_index import FORMAT, INDEX
from mcibi_fast.data.shards import check_split, import_webdataset, shard_name
from mcibi_fast.files import naming, new_directory
from mcibi_fast.progress import track


class Packed(NamedTuple):
    """What `pack` wrote: the split's folder, and its samples, shards and bytes."""

    path: Path
    samples: int
    shards: int
    bytes: int


class _Encoded(NamedTuple):
    """A sample as it goes into a shard."""

    name: str
    suffix: str
    image: bytes
    label: bytes


def pack(
    dataset: SegmentationDataset,
    out: str | Path,
    split: str,
    *,
    shard_bytes: int = 256_000_000,
    workers: int = 0,
    progress: bool = True,
) -> Packed:
    """Writes ``out/<split>``: shards and an index.

    Image files are stored unchanged (images of a dataset without files, such as `Scenes`, as PNG),
    labels as greyscale PNG of class indices. The same dataset gives the same bytes.

    Args:
        dataset: the dataset; its transform is not used.
        out: folder of all splits, created if needed.
        split: name of the folder in it.
        shard_bytes: images and labels of one shard; a larger sample has one of its own.
        workers: processes that read and encode.
        progress: show how far it is.

    The folder is written under a temporary name and renamed when all of it is on disk, so it is
    complete or does not exist. Raises ValueError when webdataset is not installed, DataError when
    the folder already exists or a sample cannot be read, OSError when writing fails.
    """
    import_webdataset()
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: {shard_bytes}, at least 1")
    path = check_free(out, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = track(
        _encode_all(dataset, workers),
        f"pack {split}",
        unit="image",
        total=len(dataset),
        show=progress,
        leave=True,
    )
    with new_directory(path) as folder:
        shards, samples = _write_shards(encoded, folder, shard_bytes)
        content = _describe(dataset, split) | {"shards": shards, "samples": samples}
        with naming(folder / INDEX):
            (folder / INDEX).write_text(json.dumps(content))
    return Packed(path, len(samples), len(shards), sum(shard["bytes"] for shard in shards))


def check_free(out: str | Path, split: str) -> Path:
    """The folder of a split below ``out``. Raises ValueError for a name that a split cannot have,
    and DataError when something is there already.
    """
    check_split(split)
    path = Path(out) / split
    if path.exists():
        raise DataError(f"{path}: already there; remove it, or choose another folder")
    return path


def _describe(dataset: SegmentationDataset, split: str) -> dict[str, Any]:
    return {
        "format": FORMAT,  # first: the file is known by it
        "split": split,
        "classes": list(dataset.classes),
        "palette": dataset.palette.tolist(),
        "flip_pairs": [list(pair) for pair in dataset.flip_pairs],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "ignore_index": dataset.ignore_index,
    }


def _write_shards(
    encoded: Iterator[_Encoded], folder: Path, shard_bytes: int
) -> tuple[list[dict[str, int]], list[list[Any]]]:
    """Writes all shards; returns the entries of the index for each shard and each sample."""
    shards: list[dict[str, int]] = []
    samples: list[list[Any]] = []
    sample = next(encoded, None)
    while sample is not None:
        path, size = folder / shard_name(len(shards)), 0
        names: list[str] = []
        with (
            naming(path),
            path.open("wb") as file,
            # A fixed time, so that the same samples give the same bytes.
            import_webdataset().TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            while sample is not None:
                size += len(sample.image) + len(sample.label)
                if names and size > shard_bytes:
                    break
                # Keys are numbers: WebDataset's must be short and have no dots.
                key = f"{len(samples) + len(names):08d}"
                images = {f"image.{sample.suffix}": sample.image, "label.png": sample.label}
                tar.write({"__key__": key} | images)
                names.append(sample.name)
                sample = next(encoded, None)
        samples += _places(path, names, len(shards))
        shards.append({"samples": len(names), "bytes": path.stat().st_size})
    return shards, samples


def _places(path: Path, names: list[str], number: int) -> list[list[Any]]:
    """Where the samples lie in a shard, and their checksums, read from the shard as written."""
    with tarfile.open(path) as tar, path.open("rb") as file:
        spans = [(member.offset_data, member.size) for member in tar.getmembers()]
        rows: list[list[Any]] = []
        for name, image, label in zip(names, spans[::2], spans[1::2], strict=True):
            file.seek(image[0])
            checksum = zlib.crc32(file.read(sum(label) - image[0]))
            rows.append([name, number, *image, *label, checksum])
    return rows


class _Encoder(Dataset):
    """Encoded samples, or the error of one that cannot be read (see `data.loading`)."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Encoded | Exception:
        return value_or_error(
            lambda: _encode(self.dataset, index), lambda: self.dataset.name(index)
        )


def _encode_all(dataset: SegmentationDataset, workers: int) -> Iterator[_Encoded]:
    loader: DataLoader = DataLoader(
        _Encoder(dataset),
        batch_size=None,
        num_workers=loader_processes(workers),
        collate_fn=_unchanged,
        # Without one of its own, a loader draws its base seed from the global generator.
        generator=torch.Generator(),
    )
    return carried(loader)


def _unchanged(sample: Any) -> Any:
    return sample


def _encode(dataset: SegmentationDataset, index: int) -> _Encoded:
    name = dataset.name(index)
    pixels, label = dataset.read(index)
    if label.min() < 0 or label.max() > 255:
        raise DataError(f"{name}: labels {label.min()}..{label.max()}; 0..255 can be packed")
    image = _image_file(dataset, index)
    # Only a file that gives what the dataset gives can stand for it.
    if image is None or not np.array_equal(decode_pixels(image[1], name), pixels):
        image = "png", _png(pixels)
    return _Encoded(name, *image, _png(label.astype(np.uint8)))


def _image_file(dataset: SegmentationDataset, index: int) -> tuple[str, bytes] | None:
    """Suffix and content of the sample's image file, where the dataset has one."""
    if isinstance(dataset, FolderDataset):
        path = dataset.pairs[index][0]
        content = read_image_file(dataset.root / path, path)
    elif isinstance(dataset, ListedDataset):
        path = dataset.items[index].image
        content = dataset.files.read(path)
    else:
        return None
    return PurePosixPath(path).suffix[1:].lower(), content


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
