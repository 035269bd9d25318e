"""The example that trains a model of each library with a memory, for two steps."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "own_decoder.py"
PACKAGES = {
    "none": "torch",
    "transformers": "transformers",
    "smp": "segmentation_models_pytorch",
    "torchvision": "torchvision",
    "mmseg": "mmseg",
    "sssegmentation": "ssseg",
}


@pytest.mark.slow
@pytest.mark.parametrize("library", PACKAGES)
def test_it_trains(
    library: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(PACKAGES[library])
    spec = importlib.util.spec_from_file_location("own_decoder", SCRIPT)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_decoder", example)
    spec.loader.exec_module(example)
    with torch.random.fork_rng(devices=[]):
        sizes = ["--steps", "2", "--batch-size", "2", "--size", "32"]
        example.main(["--library", library, *sizes, "--accumulate", "2"])
    printed = capsys.readouterr().out
    scores = re.findall(r"^mIoU (\d+\.\d\d) (before|after|with)", printed, re.MULTILINE)
    stages = [] if library == "none" else ["with"]
    assert [when for _, when in scores] == ["before", "after", *stages]
    assert all(0 <= float(score) <= 100 for score, _ in scores)
    moved = re.search(r"have moved by ([\d.]+), its deviations by ([\d.]+)", printed)
    assert moved is not None and min(map(float, moved.groups())) > 0
