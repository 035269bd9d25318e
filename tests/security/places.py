"""A checkpoint, and small datasets whose files an attack may replace."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mcibi_fast.data.shard_index import FORMAT
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights

CLASSES = ["sky", "road", "tree"]
SIZE = (16, 24)


def checkpoint(path: Path) -> Path:
    """A small model of three classes."""
    options = {"feats_channels": 8}
    colours = [[0, 0, 0], [9, 9, 9], [99, 99, 99]]
    spec = ModelSpec("fcn", "test_resnet", options, CLASSES, colours, [0.5] * 3, [0.25] * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        path.write_bytes(pack_weights(create_model(spec), spec))
    return path


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, SIZE, dtype=np.uint8)


def folder(root: Path) -> Path:
    """``images/val`` and ``labels/val`` with a.png and b.png, of three classes."""
    for kind, content in (("images", pixels()), ("labels", mask())):
        (root / kind / "val").mkdir(parents=True)
        for name in "ab":
            Image.fromarray(content).save(root / kind / "val" / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def index(image: bytes, label: bytes) -> dict:
    """``index.json`` of a shard that holds an image and a label, nothing else."""
    return {
        "format": FORMAT,
        "split": "val",
        "classes": CLASSES,
        "palette": [[0, 0, 0], [9, 9, 9], [99, 99, 99]],
        "flip_pairs": [[1, 2]],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "ignore_index": 255,
        "shards": [{"samples": 1, "bytes": len(image) + len(label)}],
        "samples": [
            ["a", 0, 0, len(image), len(image), len(label), zlib.crc32(image + label)],
        ],
    }


def shards(root: Path, image: bytes, label: bytes) -> Path:
    """A packed split with that one sample."""
    (root / "val").mkdir(parents=True)
    (root / "val" / "000000.tar").write_bytes(image + label)
    (root / "val" / "index.json").write_text(json.dumps(index(image, label)))
    return root
