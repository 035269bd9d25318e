"""Modules of one's own that contain ops, in other forms of PyTorch and in ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn import PPM, GaussianMemory, PixelLoss


class Own(nn.Module):
    """One convolution and every op that inference has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)
        self.register_buffer("memory", torch.tensor([[0.5, 1.0]] * 4))
        self.register_buffer("noise", torch.linspace(-1, 1, 24).reshape(4, 6))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.head(images)
        context = ops.gaussian_aggregate(logits, self.memory, 6, noise=self.noise)
        rows, weights = context.flatten(2).mT, logits.softmax(1).flatten(2).mT
        attended = ops.confidence_attention(rows, rows, rows)
        mixed = ops.class_rank_attention(logits.flatten(2).mT, weights, scale=0.5)
        return context, attended, mixed, ops.upsample_argmax(logits, (9, 7))


@pytest.fixture
def own() -> tuple[Own, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Own().eval(), torch.randn(1, 3, 4, 5)


def test_onnx(own: tuple[Own, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs mcibi-fast[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs mcibi-fast[onnx]")
    module, images = own
    program = torch.export.export(module, (images,)).run_decompositions(ops.decompositions())
    assert not any("mcibi_fast" in str(node.target) for node in program.graph.nodes)
    torch.onnx.export(program, verbose=False).save(tmp_path / "own.onnx")
    session = runtime.InferenceSession(tmp_path / "own.onnx")
    results = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for result, expected in zip(results, module(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected)


def test_losses_decompose_too() -> None:
    class Loss(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return ops.upsample_cross_entropy(logits, labels)

    inputs = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    program = torch.export.export(Loss(), inputs).run_decompositions(ops.decompositions())
    assert not any("mcibi_fast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs))


def test_symbolic_trace_is_refused_with_the_way_out(own: tuple[Own, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"logits: torch.fx.symbolic_trace cannot .* torch.export"):
        torch.fx.symbolic_trace(own[0])


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name[0].islower()])
def test_scripting_an_op_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name} of mcibi_fast cannot .* torch.export"):
        torch.jit.script(getattr(ops, name))


@pytest.mark.parametrize(
    "module",
    [Own(), nn.Sequential(GaussianMemory(3, 4)), nn.Sequential(PixelLoss()), PPM(4, 4)],
    ids=["op", "memory", "loss", "pyramid"],
)
def test_scripting_a_module_is_refused_with_the_way_out(module: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"of mcibi_fast cannot be scripted; use torch.export"):
        torch.jit.script(module)
