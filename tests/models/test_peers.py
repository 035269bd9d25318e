"""Every further framework, by itself and with each memory: what all frameworks can do.

`tests/compat/test_peers.py` compares them with the authors' package.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.models import SegmentationHead, Segmentor
from mcibi_fast.models.layout import to_channels_last
from mcibi_fast.nn.transient import states
from tests.models.peers_worker import CASES, OPTIONS, K, Z, build
from tests.models.ranks import two_ranks
from tests.models.stub_backbone import PEERS, stubbed
from tests.models.test_compile import assert_same_step

with_every_memory = pytest.mark.parametrize(
    ("name", "memory"), CASES, ids=["_".join(filter(None, case)) for case in CASES]
)
with_a_memory = pytest.mark.parametrize(
    ("name", "memory"),
    [case for case in CASES if case[1]],
    ids=["_".join(case) for case in CASES if case[1]],
)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stubbed(monkeypatch):
        yield


def batch(
    generator: torch.Generator, size: tuple[int, int] = (40, 48), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(0, K, (2, *size), generator=generator)
    labels[:, :3] = 255
    return images, labels


def step(model: Segmentor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    losses = model(images, labels).losses
    torch.stack(list(losses.values())).sum().backward()
    return losses


@with_every_memory
def test_training_step(name: str, memory: str | None, generator: torch.Generator) -> None:
    """Finite losses, a gradient for everything that learns, and the memory updated."""
    model = build(name, memory).train()
    before = copy.deepcopy(model.memory.memory) if memory else None
    losses = step(model, *batch(generator))
    expected = {"loss_ce" if name == "maskformer" else "loss_cls"}
    expected |= {"loss_pr"} if memory else set()
    if memory == "mcibipp" and model.head.within_image is not None:
        expected.add("loss_cwi")
    assert expected <= losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
    for own, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), own
    if memory:
        assert not torch.equal(model.memory.memory, before)


@with_a_memory
@torch.no_grad()
def test_folded_and_stages(name: str, memory: str, generator: torch.Generator) -> None:
    """Two stages at once are two calls, folded or not, on sides that no stride divides."""
    model = build(name, memory).eval()
    images, _ = batch(generator, (41, 51))
    if name == "pointrend":  # its corrections come after the last stage
        corrected = model(images, stages=2).logits
        folded = model.fold()(images, stages=2).logits
        torch.testing.assert_close(folded, corrected, rtol=1e-9, atol=1e-10)
        model.head.subdivisions = 0
    first = model(images).logits
    second = model(images, stages=2).logits
    again = model(images, previous_logits=first).logits
    torch.testing.assert_close(again, second, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model.fold()(images, stages=2).logits, second, rtol=1e-9, atol=1e-10)


@with_every_memory
@pytest.mark.thinned(always={"name": ["ocrnet"]})
def test_gradient_checkpointing(name: str, memory: str | None, generator: torch.Generator) -> None:
    """Gradients, losses and states of two steps, with dropout."""
    images, labels = batch(generator)
    found = []
    for enable in (False, True):
        model = build(name, memory, dropout=0.1).train()
        torch.manual_seed(2)
        if enable:
            with pytest.warns(UserWarning, match="Stub cannot do it"):
                model.gradient_checkpointing_enable()
        tensors = []
        for _ in range(2):
            tensors += [loss.detach() for loss in step(model, images, labels).values()]
        tensors += [p.grad for p in model.parameters() if p.requires_grad]
        found.append([*tensors, *(t.clone() for t in states(model))])
    for value, right in zip(*reversed(found), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-11)


@with_every_memory
@pytest.mark.thinned(always={"name": ["ocrnet"]})
def test_bf16_autocast(name: str, memory: str | None, generator: torch.Generator) -> None:
    model = build(name, memory).float().train()
    images, labels = batch(generator, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, labels).losses
    expected = copy.deepcopy(model)(images, labels).losses
    torch.stack(list(losses.values())).sum().backward()
    for own, loss in losses.items():
        right = expected[own].detach()
        assert abs(loss.detach() - right) <= 0.1 * right, own
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    floating = [t for t in states(model) if t.is_floating_point()]
    assert all(t.isfinite().all() and t.dtype != torch.bfloat16 for t in floating)


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_maps_stay_in_channels_last(name: str, generator: torch.Generator) -> None:
    model = build(name, None).eval()
    to_channels_last(model)
    seen: list[bool] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    images, _ = batch(generator)
    logits = model(images).logits
    assert len(seen) > 5 and all(seen)
    torch.testing.assert_close(build(name, None).eval()(images).logits, logits)


@pytest.mark.parametrize("name", [name for name, memory in CASES if memory == "mcibipp"])
def test_video(name: str, generator: torch.Generator) -> None:
    """A clip of two frames, with finite losses and gradients of the whole head."""
    options = {"feats_channels": Z, "transform_channels": 8, **OPTIONS.get(name, {})}
    framework = name.split()[0]
    model = models.create(framework, K, memory="mcibipp", history=1, **options).double().train()
    images, labels = batch(generator)
    clip = torch.stack([images.flip(3), images], dim=1)
    losses = step(model, clip, labels)
    assert {"loss_cls", "loss_pr"} <= losses.keys()
    assert ("loss_cwi" in losses) == (model.head.within_image is not None)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.head.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PEERS)
def test_names(name: str) -> None:
    for memory in [memory for framework, memory in CASES if framework == name]:
        cls = models.head_type(name, memory)
        assert getattr(models, cls.__name__) is cls and issubclass(cls, SegmentationHead)
        assert models.registry.ModelKind(name, memory).name in models.names()
    title, source, context = models.registry.described(name)
    assert title and source and context
    with pytest.raises(TypeError, match="colour"):
        models.create(name, K, colour=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "memory"), [case for case in CASES if case[1] != "mcibi"])
@pytest.mark.thinned(always={"name": ["ocrnet"]})
def test_compiled(name: str, memory: str | None, generator: torch.Generator) -> None:
    """A training step and an evaluation, without a graph break.

    MCIBI differs in the memory, which `test_compile.py` compiles.
    """
    torch._dynamo.reset()
    model = build(name, memory).train()
    twin = copy.deepcopy(model)
    images, labels = batch(generator, (32, 32))
    if name != "maskformer":  # its losses are of an assignment that the CPU computes
        assert_same_step(model, twin, images, labels, backend="eager")
    torch._dynamo.reset()
    options = {"stages": 2} if memory else {}
    with torch.no_grad():
        expected = model.eval()(images, **options).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images, **options).logits, expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """They end with equal weights and states, those of one process with the whole batch."""
    if not dist.is_gloo_available():
        pytest.skip("needs a PyTorch with gloo")
    worker = Path(__file__).with_name("peers_worker.py")
    with two_ranks(worker, tmp_path / "rendezvous", tmp_path):
        whole = runpy.run_path(str(worker))["run"](0, 1)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=1e-13)
        if name.split()[0] not in ("ce2p", "maskformer", "pointrend"):  # their losses are per rank
            torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-10, msg=name)
