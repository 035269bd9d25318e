"""What a trained model makes of the context."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import camvid_context
from mcibi_fast.recipes.registry import configure
from mcibi_fast.training.train import train
from tests.benchmarks.small_camvid import SETTINGS, write_small_camvid


def test_contexts_of_other_images_and_their_mean() -> None:
    images = camvid_context.Images()
    contexts = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 4)
    for part in contexts.split(2):
        assert torch.equal(images.keep(part), part)
    others = torch.cat([images.other(part) for part in contexts.split(2)])
    assert others[:, 0, 0, 0].tolist() == [2, 3, 4, 0, 1]
    assert torch.equal(images.mean(contexts[:3]), torch.full((3, 2, 3, 4), 2.0))


@pytest.mark.slow
def test_scores_of_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    root = write_small_camvid(tmp_path / "data")
    settings = [*SETTINGS, "model.options.feats_channels=8", "epochs=1"]
    threads = torch.get_num_threads()
    for memory in ("mcibipp", "none"):
        config = configure("camvid_lite", root, [*settings, f"model.memory={memory}"])
        train(config, tmp_path / memory)
    monkeypatch.setattr(sys, "argv", ["camvid_context", str(tmp_path / "mcibipp")])
    camvid_context.main()
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line[:20].rstrip() for line in lines] == [
        "as trained", "zero", "mean over the image", "of another image", "mean over all images",
    ]  # fmt: skip
    assert all(0 <= float(line[20:]) <= 100 for line in lines)
    with pytest.raises(SystemExit, match="without a memory"):
        list(camvid_context.scores(tmp_path / "none"))
    torch.set_num_threads(threads)
