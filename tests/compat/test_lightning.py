"""Lightning: the example's module trains our models and others', also on two processes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader

from mcibi_fast import models
from mcibi_fast.data import Scenes
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.nn.accumulation import more_passes

lightning = pytest.importorskip("lightning", reason="needs lightning")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "lightning_module.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lightning_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_in_bf16() -> None:
    arguments = "--backbone test_resnet --batch 2 --images 16 --size 32 --steps 3 --accumulate 2"
    arguments += " --devices 2 --accelerator cpu --precision bf16-mixed"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments.split()],
        capture_output=True, text=True, cwd=ROOT, timeout=550,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = re.findall(r"^steps 3, loss ([\d.]+), mean IoU ([\d.]+)$", run.stdout, re.MULTILINE)
    assert len(found) == 1 and 0 < float(found[0][0]) < 10, run.stdout


@pytest.mark.parametrize(
    "name", ["torchvision:lraspp_mobilenet_v3_large", "smp:Unet", "fcn_mcibipp"]
)
def test_models_of_others(example: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trains, and of ours the memory learns once per step from all passes."""
    if name.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="needs smp")
    sizes: list[int] = []
    update = GaussianMemory.update

    def counted(self: GaussianMemory, features: torch.Tensor, labels: torch.Tensor) -> None:
        sizes.append(len(features))
        update(self, features, labels)

    monkeypatch.setattr(GaussianMemory, "update", counted)
    torch.manual_seed(0)
    backbone = "resnet18" if name.startswith("smp") else "test_resnet"
    module = example.SegmentationModule(example.network(name, backbone), example.K)
    before = [p.detach().clone() for p in module.model.parameters()]
    data = DataLoader(Scenes("train", count=6, size=64, seed=0), 2)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 2  # of two passes and of one
    assert sizes == ([4, 2] if isinstance(module.model, models.Segmentor) else [])
    after = list(module.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    (scores,) = trainer.validate(module, data, verbose=False)
    assert 0 <= scores["mean_iou"] <= 1


def test_passes_by_hand() -> None:
    """Plain PyTorch: what was not finished is forgotten when evaluation begins."""
    torch.manual_seed(0)
    model = models.create("fcn_mcibipp", 3, "test_resnet", feats_channels=8, transform_channels=8)
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    start = model.memory.memory.clone()
    with more_passes():
        model(images, labels)
        assert torch.equal(model.memory.memory, start) and len(model.head._passes) == 1
        with more_passes(False):
            model(images, labels)
    assert not torch.equal(model.memory.memory, start) and model.head._passes == []
    with more_passes():
        model(images, labels)
    model.eval()
    assert model.head._passes == []
