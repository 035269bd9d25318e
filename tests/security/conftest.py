"""A run and its data, which tests turn into those of an attacker."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast.recipes import AugmentationConfig, FolderData, ModelConfig, TrainConfig

CLASSES = ("road", "sky", "tree")


def write_data(root: Path) -> Path:
    """Four images of each of two splits, 32x40, with three classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            label = rng.integers(3, size=(4, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = (label[..., None] * 70 + rng.integers(40, size=(32, 40, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all tests of this folder as slow: they are many, most in a process of their own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained for two steps, on the data beside it; only read."""
    from mcibi_fast.training.train import train

    base = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        data=FolderData(str(write_data(base / "data"))),
        model=ModelConfig(
            backbone="test_resnet", options={"feats_channels": 8, "transform_channels": 8}
        ),
        augmentation=AugmentationConfig(crop_size=(32, 32)),
        epochs=1,
        batch_size=2,
        device="cpu",
        workers=0,
        log_every=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        train(config, base / "run", progress=False, report=lambda line: None)
    return base / "run"


@pytest.fixture
def security_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


@pytest.fixture
def security_data(tmp_path: Path) -> Path:
    """Data of the run's three classes."""
    return write_data(tmp_path / "data")
