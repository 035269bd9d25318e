"""``train --from RUN``: the model of a run on other data, with its weights where they fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from mcibi_fast import cli
from mcibi_fast.models.weights import find_weights, read_spec
from mcibi_fast.recipes.registry import configure
from mcibi_fast.training.train import train
from tests.commands.folders import write_folder
from tests.tiny_run import make_tiny_config


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on scenes of 12 classes."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with torch.random.fork_rng(devices=[]):
        train(make_tiny_config("epochs=1"), out, progress=False, report=lambda _: None)
    return out


@pytest.mark.usefixtures("own_generator")
def test_a_run_on_other_classes(first: Path, tmp_path: Path, capfd) -> None:
    mask = (np.arange(32 * 32, dtype=np.uint8) % 3).reshape(32, 32)
    root = write_folder(tmp_path / "data", mask, np.repeat(mask[..., None] * 80, 3, axis=2))
    threads = torch.get_num_threads()
    status = cli.main([
        "train", "folder", "--root", str(root), "--from", str(first), "--out",
        str(tmp_path / "tuned"), "--quiet", "--set", "epochs=1", "batch_size=2", "workers=0",
        "device=cpu", "augmentation.crop_size=[32,32]", "optimizer.lr=1e-30",
    ])  # fmt: skip
    torch.set_num_threads(threads)
    assert status == 0
    printed = capfd.readouterr().out
    begun = re.search(r"the model begins with (\d+) tensors of (\S+); fresh: (.*); not", printed)
    assert begun and begun[2] == str(find_weights(first))
    assert begun[3] == (
        "head.context.memory, head.context.weight_head.classifier, head.decoder.classifier, "
        "head.auxiliary.classifier"
    )
    old, new = (read_spec(find_weights(folder)) for folder in (first, tmp_path / "tuned"))
    assert (new.name, new.backbone) == (old.name, old.backbone)
    assert new.options == old.options | {"pretrained": str(first)}
    assert (new.mean, new.std, len(new.classes)) == (old.mean, old.std, 3)
    before, after = (
        safetensors.torch.load_file(find_weights(folder)) for folder in (first, tmp_path / "tuned")
    )
    # What was taken over is unchanged at such a rate, but for the statistics of batch norms.
    kept = [n for n in before if n.endswith(".weight") and before[n].shape == after[n].shape]
    assert len(kept) > 30 and all(torch.equal(before[n], after[n]) for n in kept)


def test_settings_come_after_it(first: Path) -> None:
    config = configure("scenes", None, ["model.options.dropout=0.5"], start=str(first))
    assert config.model.name == "fcn_mcibipp"
    assert config.model.options["dropout"] == 0.5
    assert config.model.options["feats_channels"] == 8
    assert config.epochs == configure("scenes", None, []).epochs


def test_mistakes(first: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    text = fails("train", "folder", "--root", tmp_path, "--from", first, "--framework", "pspnet")
    assert f"--from takes the model of {first}; change it with --set model" in text
    assert "checkpoint: nowhere does not exist" in fails("train", "scenes", "--from", "nowhere")
    assert "is not a checkpoint of mcibi_fast" in fails("train", "scenes", "--from", __file__)
    assert "--resume goes on with" in fails("train", "--resume", first, "--from", first)
