"""Scores of videos dealt to two ranks are those of one rank with all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metrics.video_worker import count, make


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.metrics.video_worker", str(rank), store,
             str(tmp_path / f"{rank}.json")],
            env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    for protocol in ("vspw2021", "strict"):
        alone = count(make(protocol), range(5)).compute().as_dict()
        assert alone["tc_pairs"] == 3 + 4 + 5 + 6  # of the first four videos
        for rank in range(2):
            scores = json.loads((tmp_path / f"{rank}.json").read_text())[protocol]
            assert scores == pytest.approx(alone)
