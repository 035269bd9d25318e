"""Our training beside that of the released package itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import released_training
from tests.benchmarks.small_camvid import SETTINGS, write_small_camvid

PACKAGE = os.environ.get("SSSEGMENTATION")


@pytest.mark.skipif(
    PACKAGE is None,
    reason="needs a checkout of https://github.com/SegmentationBLWX/sssegmentation, which no "
    "registry has, in the environment variable SSSEGMENTATION",
)
def test_losses_of_every_step_are_the_released_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_small_camvid(tmp_path / "data")
    settings = [*SETTINGS, "optimizer.lr=0.001"]
    monkeypatch.syspath_prepend(str(PACKAGE))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        found = released_training.compare(root, tmp_path / "run", 4, torch.float64, settings)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        for name in [name for name in sys.modules if name.split(".")[0] == "ssseg"]:
            del sys.modules[name]
    ours, theirs, again = found
    assert len(ours) == len(theirs) == len(again) >= 4
    for number, (step, released) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("loss_cls", "loss_pr", "loss_aux"):
            # The released table of representations is formed in float32, ours in float64.
            assert step[name] == pytest.approx(released[name], rel=1e-5 if number else 1e-12)
    released_training.tell(found, tmp_path)
    assert "released - itself" in capsys.readouterr().out
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 1 + len(ours)
