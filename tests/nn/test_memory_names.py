"""A model that holds a memory both itself and in a context: one key in its state dict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mcibi_fast.nn import DatasetLevelContext, DiagonalMemory, GaussianMemory, LearntMemory
from mcibi_fast.nn.class_memory import ClassMemory

MEMORIES = [GaussianMemory, DiagonalMemory, LearntMemory]


class Net(nn.Module):
    def __init__(self, make: Callable[[int, int], ClassMemory], *names: str) -> None:
        super().__init__()
        memory = make(5, 8)
        with torch.no_grad():
            memory.memory.uniform_(1, 2)
        context = DatasetLevelContext(memory, transform_channels=4)
        for name in names:
            setattr(self, name, memory if name == "memory" else context)


@pytest.mark.parametrize("names", [("memory", "context"), ("context", "memory"), ("context", "c2")])
@pytest.mark.parametrize("make", MEMORIES)
def test_the_memory_is_saved_once_and_loads(make, names) -> None:
    net = Net(make, *names)
    saved = net.state_dict()
    keys = [key for key in saved if key.endswith("memory")]
    assert keys == ["memory.memory" if names[0] == "memory" else "context.memory.memory"]
    for other in (Net(make, *names), Net(make, *names[::-1])):
        expected = dict(saved)
        if "c2" in names:  # the rest of a context has two names, as of any module
            expected |= {k.replace("context.", "c2."): v for k, v in saved.items()}
        other.load_state_dict(expected)
        held = other.memory if hasattr(other, "memory") else other.context.memory
        assert torch.equal(held.memory, saved[keys[0]])


@pytest.mark.parametrize("make", MEMORIES)
def test_old_state_dicts_with_both_keys_load_and_a_missing_one_is_named(make) -> None:
    net, other = Net(make, "memory", "context"), Net(make, "memory", "context")
    saved = net.state_dict() | {"context.memory.memory": net.memory.memory.detach()}
    other.load_state_dict(saved)
    assert torch.equal(other.memory.memory, net.memory.memory)
    for key in ("memory.memory", "context.memory.memory"):
        del saved[key]
    with pytest.raises(RuntimeError, match=r'Missing key.*"memory.memory"'):
        other.load_state_dict(saved)
    assert Net(make, "context").load_state_dict(saved, strict=False).missing_keys == [
        "context.memory.memory"
    ]
