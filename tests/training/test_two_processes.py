"""Two CPU processes (gloo, torchrun) against one, on splits of odd size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mcibi_fast

PACKAGE = str(
    Path(mcibi_fast.__file__).parents[1]
)  # what this process tests, not what is installed

# Batch norms frozen and dropout 0: then one process with the whole batch computes the same as two
# with half of it each, up to the order of sums.  Labels have no ignored pixels, so the mean over
# a rank's valid pixels is an equal part of the mean over all.
DRIVER = '''
import atexit, dataclasses, json, os, sys
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from mcibi_fast.data import SegmentationDataset
from mcibi_fast.models import SegmentationHead
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.recipes import (
    AugmentationConfig, InferenceConfig, ModelConfig, ScenesData, TrainConfig, apply_settings
)
from accelerate import Accelerator

# Called last: by then the group is left, or gloo's threads may abort the process.
atexit.register(lambda: dist.is_initialized() and os._exit(3))
torch.set_num_threads(1)
nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)

class Blocks(SegmentationDataset):
    classes = ["a", "b", "c"]
    palette = np.eye(3, dtype=np.uint8) * 255
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, count, seed):
        super().__init__()
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def name(self, index):
        return str(index)

    def read(self, index):
        rng = np.random.default_rng((self.seed, index))
        label = rng.integers(3, size=(7, 8)).repeat(6, 0).repeat(6, 1).astype(np.uint8)
        image = rng.integers(60, size=(42, 48, 3)) + 60 * label[..., None]
        return image.astype(np.uint8), label

class Data(ScenesData):
    def dataset(self, split):
        return Blocks(*{"train": (13, 0), "val": (5, 1)}[split])

class ByColour(nn.Module):
    """Predicts every class, as a hardly trained network does not."""

    head = SegmentationHead()
    needs_labels = False

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 3, 8, 8, generator=generator)
        self.weight = nn.Parameter(weight - weight.mean((1, 2, 3), keepdim=True))

    def forward(self, images):
        return SegmentationOutput(nn.functional.conv2d(images, self.weight, stride=8), {})

options = {"feats_channels": 8, "transform_channels": 8, "form": "paper", "dropout": 0.0}
config = TrainConfig(
    data=Data(),
    model=ModelConfig(backbone="test_resnet", options=options),
    augmentation=AugmentationConfig(crop_size=(32, 32), scale=(1.0, 1.25), max_class_share=1.0),
    epochs=2, batch_size=4, device="cpu", workers=0, log_every=1,
)
out, checkpoint, result, *settings = sys.argv[1:]
apply_settings(config, settings)
if config.model.name == "fcn":
    config.model.options = {"feats_channels": 8, "dropout": 0.0}
seed_global_generators(0)
metrics = train(config, out, progress=False).metrics
accelerator = Accelerator(cpu=True)
model, _ = load_model(checkpoint)
dataset = Data().dataset("val")
dataset.flip_pairs = ((0, 1),)
views = InferenceConfig((0.75, 1.25), flip=True)
matrices = [
    evaluate(network, dataset, inference=inference, batch_size=2, accelerator=accelerator).matrix
    for network, inference in ((model, None), (ByColour(), None), (ByColour(), views))
]
if accelerator.is_main_process:
    content = {"trained": metrics, "matrices": [matrix.tolist() for matrix in matrices],
               "world": accelerator.num_processes}
    open(result, "w").write(json.dumps(content))
'''


def launch(processes: int, *arguments: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Micro-batches of several processes hold other images than those of one, and a memory is updated
# once for each; so these are compared without one.  An epsilon of 0 probes and changes nothing.
ACCUMULATED = (
    "model.name=fcn",
    "accumulate=2",
    "ema=0.5",
    "adversarial.probability=1",
    "adversarial.epsilon=0",
    "loss.class_weights=balanced",
    "epochs=1",
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ACCUMULATED], ids=["plain", "accumulated"])
def test_two_processes_equal_one(tmp_path: Path, settings: tuple[str, ...]) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    results = {}
    checkpoint = str(tmp_path / "run1")  # both judge the first's weights
    for world in (1, 2):
        result = tmp_path / f"result{world}.json"
        run = str(tmp_path / f"run{world}")
        launch(world, str(driver), run, checkpoint, str(result), *settings)
        results[world] = json.loads(result.read_text())
        assert results[world]["world"] == world

    # One set of weights: the same confusion matrices exactly, every pixel of 5 images once; the
    # last at two scales with mirrored views.
    assert results[1]["matrices"] == results[2]["matrices"]
    matrices = torch.tensor(results[2]["matrices"])
    assert matrices.sum((1, 2)).tolist() == [5 * 42 * 48] * 3
    assert (matrices[1:].sum(1) > 0).all() and not torch.equal(matrices[1], matrices[2])

    weights = {
        world: safetensors.torch.load_file(
            tmp_path / f"run{world}" / "checkpoints" / "last" / "model.safetensors"
        )
        for world in (1, 2)
    }
    assert weights[2].keys() == weights[1].keys() and len(weights[1]) > 0
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[2][name], expected, rtol=1e-4, atol=1e-5, msg=name)
    for name in ("mean_iou", "pixel_accuracy", "mean_class_accuracy"):
        expected = results[1]["trained"][name]
        assert results[2]["trained"][name] == pytest.approx(expected, abs=2e-3), name
