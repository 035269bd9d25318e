"""`accelerate` on the authors' package itself: every segmentor, training steps, two processes."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcibi_fast.compat.accelerate import (
    _Attention,
    _Memory,
    _owner,
    _released,
    _Swapped,
    accelerate,
)
from mcibi_fast.training.processes import leave_group
from tests.compat import zoo_models as zoo
from tests.compat.all_segmentors import OF_MMCV, small_settings

KINDS = list(zoo.builder.SegmentorBuilder.REGISTERED_MODULES)
# Number of modules with new methods. All other segmentors have none.
ACCELERATED = {"MCIBIPlusPlus": 2, "MCIBI": 2, "ISNet": 2, "ANNNet": 2, "IDRNet": 1}
# They need further packages or a prompt besides the image; the test of all classes covers them.
NOT_BUILT = {"SAM", "SAMHQ", "SAMV2", "EdgeSAM", "MobileSAM", "MaskFormer", "Mask2Former"}


def classes() -> Iterator[type[nn.Module]]:
    """All modules that the package defines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in pkgutil.walk_packages(
            zoo.ssseg.modules.models.__path__, "ssseg.modules.models."
        ):
            if info.name.endswith("initmemory"):  # a program of its own
                continue
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # an operator that must be compiled
                continue
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if issubclass(kind, nn.Module) and kind.__module__ == info.name:
                    yield kind


def test_which_classes_get_new_methods() -> None:
    """Those two and no other, whatever its name."""
    found = set()
    for kind in classes():
        for own in (_Memory, _Attention):
            base = _released(kind, own)
            if base and any(_owner(kind, method) is base for method in own.methods):
                found.add((kind.__module__.partition("segmentors.")[2], kind.__name__))
    assert found == {
        ("base.selfattention", "SelfAttentionBlock"),
        ("mcibiplusplus.memoryv2", "FeaturesMemoryV2"),
    }


def built(kind: str, patch: pytest.MonkeyPatch, generator: torch.Generator) -> nn.Module:
    if kind in OF_MMCV:
        place, stand_in = OF_MMCV[kind]
        patch.setattr(f"ssseg.modules.models.segmentors.{place}", stand_in)
    config = small_settings(kind)
    model = zoo.scramble(zoo.build(config).eval(), generator)
    return model if kind == "PointRend" else model.double()  # whose points are float32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_BUILT])
def test_every_segmentor(
    kind: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    slow = built(kind, monkeypatch, generator)
    side = 401 if kind == "LRASPPNet" else 129  # it pools over 49 x 49
    images = torch.randn(1, 3, side, side + 32, generator=generator)
    images = images.to(next(slow.parameters()).dtype)
    expected = zoo.logits(slow, images)
    fast = copy.deepcopy(slow)
    if kind not in ACCELERATED:
        kinds = [type(module) for module in fast.modules()]
        with pytest.raises(ValueError, match="holds no FeaturesMemoryV2"):
            accelerate(fast)
        assert [type(module) for module in fast.modules()] == kinds
        assert torch.equal(zoo.logits(fast, images), expected)
        return
    accelerate(fast)
    swapped = Counter(isinstance(module, _Swapped) for module in fast.modules())
    assert swapped[True] == ACCELERATED[kind]
    assert (zoo.logits(fast, images) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_all_are_tried() -> None:
    assert set(KINDS) >= NOT_BUILT and set(ACCELERATED) <= set(KINDS)
    assert len(KINDS) == 39


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, 65, 81, generator=generator, dtype=torch.float64)
    labels = torch.randint(8, (2, 65, 81), generator=generator)
    labels[0, :5] = -100
    return images, labels


def step(model: nn.Module, images: Tensor, labels: Tensor, **forward: object) -> Tensor:
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        loss = model(zoo.inputs(images, labels, "TRAIN"), **forward).loss
    loss.backward()
    return loss.detach()


def check_step(fast: nn.Module, slow: nn.Module, data: tuple[Tensor, Tensor], **forward) -> None:
    losses = [step(model.train(), *data, **forward) for model in (fast, slow)]
    assert abs(losses[0] - losses[1]) <= 1e-10 * abs(losses[1])
    gradients = dict(slow.named_parameters())
    largest = max(p.grad.abs().max() for p in gradients.values() if p.grad is not None)
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            difference = (parameter.grad - gradients[name].grad).abs().max()
            assert difference <= 1e-10 * largest, name
    for (name, value), expected in zip(
        fast.state_dict().items(), slow.state_dict().values(), strict=True
    ):
        if "memory_module.memory" in name or "running" in name:
            assert (value - expected).abs().max() <= 1e-10 * expected.abs().max(), name


TRAINED = {
    "mcibiplusplus_resnet50os8_ade20k": {"learning_rate": 0.01, "epoch": 2},
    "mcibiplusplus_upernet_swinlarge_ade20k": {"learning_rate": 0.01, "epoch": 2},
    "mcibiplusplus_aspp_hrnetv2w48_lip": {"learning_rate": 0.01, "epoch": 2},
    "mcibi_deeplabv3_r50_ade20k": {"learning_rate": 0.004, "epoch": 2},
    "isnet_resnet50os8_lip": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_steps(name: str, generator: torch.Generator) -> None:
    slow = zoo.scramble(zoo.released(zoo.PUBLISHED[name]), generator).double()
    fast = accelerate(copy.deepcopy(slow))
    for _ in range(2):
        check_step(fast, slow, batch(generator), **TRAINED[name])


def one_rank(rank: int, rendezvous: Path) -> None:
    """Accelerated before it is wrapped, and after."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for first in (True, False):
        steps_of_one_rank(rank, first)
    leave_group()


def steps_of_one_rank(rank: int, first: bool) -> None:
    """Four optimiser steps; each rank's images have classes that the other's lack."""
    entry = zoo.PUBLISHED["mcibiplusplus_aspp_resnet50os8_lip"]
    slow = zoo.scramble(zoo.released(entry), torch.Generator().manual_seed(0)).double()
    fast = copy.deepcopy(slow)
    if first:
        accelerate(fast)
    slow, fast = (nn.parallel.DistributedDataParallel(model) for model in (slow, fast))
    if not first:
        accelerate(fast)
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3) for model in (slow, fast)]
    generator = torch.Generator().manual_seed(rank + 1)
    for _ in range(4):
        images, labels = batch(generator)
        labels[labels == rank] = -100
        check_step(fast, slow, (images, labels), learning_rate=0.01, epoch=2)
        for optimizer in optimizers:
            optimizer.step()
    memory = fast.module.memory_module.memory.data
    everywhere = [torch.empty_like(memory) for _ in range(2)]
    dist.all_gather(everywhere, memory)
    assert torch.equal(*everywhere)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    if not dist.is_gloo_available():
        pytest.skip("needs a PyTorch with gloo")
    torch.multiprocessing.spawn(one_rank, (tmp_path / "rendezvous",), nprocs=2)
