"""A small folder dataset that tests may damage, and a packed one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import Scenes, pack

NAMES = ["sky", "road", "tree"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes; train a, b, c (24x16, b a PNG) and val d; the labels hold 0, 1, 2 and 255."""
    rng = np.random.default_rng(0)
    for split, names in {"train": ["a.jpg", "b.png", "c.JPEG"], "val": ["d.jpg"]}.items():
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for name in names:
            image = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "images" / split / name)
            label = rng.choice(np.array([0, 1, 2, 255], np.uint8), (16, 24))
            Image.fromarray(label).save(tmp_path / "labels" / split / f"{name[0]}.png")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


@pytest.fixture
def write_label(tree: Path) -> Callable[[str, np.ndarray], None]:
    """Puts another mask in place of ``labels/<name>.png``."""

    def write(name: str, label: np.ndarray) -> None:
        Image.fromarray(label).save(tree / "labels" / f"{name}.png")

    return write


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
