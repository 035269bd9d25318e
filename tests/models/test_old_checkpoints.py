"""Checkpoints of the code before composition load, and give the logits that they gave."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from mcibi_fast import models
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes import TrainConfig

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
NAMES = ("isnet", "pspnet_mcibipp", "upernet_mcibi", "upernet_video_mcibipp")


def images(name: str) -> torch.Tensor:
    shape = (1, 3, 3, 65, 47) if "video" in name else (1, 3, 65, 47)
    return torch.from_numpy(np.random.default_rng(2).standard_normal(shape))


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay(name: str, tmp_path: Path) -> None:
    """To rounding: which bits a convolution has in float64 depends on the processor."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(lzma.decompress((CHECKPOINTS / f"{name}.safetensors.xz").read_bytes()))
    model, spec = load_model(file)
    assert spec.name == name and isinstance(model, models.VideoSegmentor) == ("video" in name)
    with np.load(CHECKPOINTS / "logits.npz") as recorded, torch.no_grad():
        logits = model.double()(images(name)).logits.numpy()
        assert np.abs(logits - recorded[name]).max() < 1e-13
        assert recorded[name].std() > 0.1


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"name": "fcn", "options": {"form": "paper"}}, ("fcn", None, 0)),
        ({"name": "upernet_mcibi", "options": {}}, ("upernet", "mcibi", 0)),
        ({"name": "upernet_video_mcibipp", "options": {}}, ("upernet", "mcibipp", 2)),
        ({"name": "fcn_video_mcibi", "options": {"history": 1}}, ("fcn", "mcibi", 1)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_runs_of_one_word(stored: dict, expected: tuple[str, str | None, int]) -> None:
    """The config.json of an earlier run, and what it becomes when it is written again."""
    written = TrainConfig().to_dict() | {"model": {"backbone": "resnet18"} | stored}
    config = TrainConfig.from_dict(json.loads(json.dumps(written)))
    config.validate()
    assert config.model.name == stored["name"]
    framework, memory, history = expected
    assert (config.model.framework, config.model.memory) == (framework, memory)
    assert config.model.arguments().get("history", 0) == history
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
