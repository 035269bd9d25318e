"""What the tests of ``compat.<library>.accelerate`` share."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

K, SIZE = 6, (64, 64)


def images(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=generator, dtype=dtype)


def labels(generator: torch.Generator) -> Tensor:
    """(B, H, W), with ignored pixels (255)."""
    found = torch.randint(0, K, (2, *SIZE), generator=generator)
    found[:, :5] = 255
    return found


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


class Formed(TorchDispatchMode):
    """Whether a tensor of this shape, or of one image of it, is computed."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shapes = {shape, shape[1:], (1, *shape[1:])}
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.found |= type(tensor) is Tensor and tuple(tensor.shape) in self.shapes
        return result


def forms_upsampled_logits(run: Callable[[], Any]) -> bool:
    with Formed(2, K, *SIZE) as formed:
        run()
    return formed.found


def step(model: nn.Module, loss_of: Callable[[Any], Tensor]) -> list[Tensor]:
    """The loss and the gradients of the parameters."""
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-3)


def check_accelerate(
    library: Any,
    slow: nn.Module,
    loss_of: Callable[[Any], Tensor],
    predict: Callable[[Any], Tensor],
) -> Any:
    """Everything that holds for every model; returns the accelerated copy.

    Training and evaluation agree with the library's own, the upsampled logits are not formed,
    copies and pickles are accelerated as well, and `restore` gives the library's own classes back.
    """
    weights = copy.deepcopy(slow)
    fast = copy.deepcopy(slow)
    keys, parameters = list(fast.state_dict()), list(fast.parameters())
    assert library.explain(fast).replaceable and not library.explain(fast).replaced
    assert library.accelerate(fast) is fast and library.accelerate(fast) is fast
    assert list(fast.state_dict()) == keys
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))
    assert isinstance(fast, type(slow)) and type(fast).__name__ == type(slow).__name__
    explained = library.explain(fast)
    assert explained.replaced and not explained.replaceable
    assert "replaced:" in str(explained)

    for model in (slow, fast):
        model.train()
    assert_close(step(fast, loss_of), step(slow, loss_of))
    assert_close(list(fast.buffers()), list(slow.buffers()))
    for model in (slow, fast):
        model.eval()
    assert_close(step(fast, loss_of), step(slow, loss_of))
    with torch.no_grad():
        assert torch.equal(predict(fast), predict(slow))
        assert forms_upsampled_logits(lambda: predict(slow))
        assert not forms_upsampled_logits(lambda: predict(fast))
    assert forms_upsampled_logits(lambda: step(slow, loss_of))
    assert not forms_upsampled_logits(lambda: step(fast, loss_of))

    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert [type(m) for m in copied.modules()] == [type(m) for m in fast.modules()]
        assert torch.equal(step(copied, loss_of)[0], step(fast, loss_of)[0])
    restored = library.restore(copy.deepcopy(fast))
    assert [type(m) for m in restored.modules()] == [type(m) for m in weights.modules()]
    assert torch.equal(step(restored, loss_of)[0], step(slow, loss_of)[0])
    assert not library.explain(restored).replaced
    return fast
