"""What holds for every library's ``with_mcibi``: a training on the built-in scenes, and more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.data.synthetic.scenes import Scenes
from tests.compat import dropin

K = 12  # classes of the scenes
SMALL = {"transform_channels": 8, "momentum": 0.1}
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@cache
def scenes(size: int = 64) -> tuple[Tensor, Tensor]:
    """Four scenes: images (4, 3, size, size) and labels (4, size, size) int64."""
    samples = [Scenes("train", count=4, size=size, seed=0)[i] for i in range(4)]
    return torch.stack([s["image"] for s in samples]), torch.stack(
        [s["label"].long() for s in samples]
    )


def train(model: nn.Module, loss_of: Loss, steps: int = 200) -> tuple[list[float], list[int]]:
    """Adam on crops of the scenes, 32 pixels a side; every tenth step has two micro-batches.

    Returns:
        The losses of the steps, and the numbers of labelled pixels that they have.
    """
    places = torch.randint(0, 33, (steps, 2), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, pixels = [], []
    for step, (y, x) in enumerate(places):
        images, labels = (t[..., y : y + 32, x : x + 32].contiguous() for t in scenes())
        total, parts = 0.0, 1 if step % 10 else 2
        for part in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            loss = loss_of(model, *part) / parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        pixels.append(int((labels < K).sum()))
    return losses, pixels


def check_training(model: nn.Module, loss_of: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 200 steps losses fall; each step updates the memory once, by all of its micro-batches."""
    memory = context_of(model).context.memory
    updates = []
    learn = type(memory)._learn

    def counted(self, statistics, forwards):
        updates.append((int(statistics[1].sum()), int(forwards)))
        learn(self, statistics, forwards)

    monkeypatch.setattr(type(memory), "_learn", counted)
    before = memory.memory.clone()
    losses, pixels = train(model.train(), loss_of)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-40:]))
    assert last < 0.6 * first, losses
    assert updates == [(count, 1) for count in pixels]
    seen = scenes()[1].unique()
    moved = (memory.memory - before).abs().amax(1)[seen[seen < K]]
    assert memory.memory.isfinite().all() and bool((moved > 0.05).all()), moved


def check_accelerated(
    library: Any,
    build: Callable[[], nn.Module],
    loss_of: Loss,
    logits_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    upsamples: bool = True,
    pickles: bool = True,
) -> None:
    """``with_mcibi`` and ``accelerate`` in both orders: the model of ``with_mcibi`` alone, faster.

    Args:
        build: a new model without a memory, always with the same weights.
        upsamples: whether it is the upsampling of the logits that becomes faster.
        pickles: whether the library's own model can be pickled.
    """
    images, labels = scenes()[0].double(), scenes()[1]
    add = partial(library.with_mcibi, **SMALL)

    def made(*order: Callable[[nn.Module], nn.Module]) -> nn.Module:
        model = build()
        for change in order:
            assert change(model) is model
        return dropin.without_dropout(model).double()

    def loss(model: nn.Module) -> Tensor:
        return loss_of(model.train(), images, labels)

    def results(model: nn.Module) -> list[Tensor]:
        """Of two steps: losses, gradients, states, and the logits of two stages afterwards."""
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.01), []
        for _ in range(2):
            found += dropin.step(model, loss)
            optimizer.step()
            found += [tensor.clone() for tensor in model.state_dict().values()]
        context_of(model).stages = 2
        with torch.no_grad():
            return [*found, logits_of(model.eval(), images)]

    plain = made(add)
    expected = results(plain)
    for order in ((add, library.accelerate), (library.accelerate, add)):
        model = made(*order)
        explained = library.explain(model)
        assert explained.replaced and not explained.replaceable and not explained.left_alone
        copies = [copy.deepcopy(model), *([pickle.loads(pickle.dumps(model))] if pickles else [])]
        for copied in copies:
            assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
            dropin.assert_close([loss(copied)], expected[:1])
        dropin.assert_close(results(model), expected)
        for each, forms in ((plain, True), (model, not upsamples)):
            with dropin.Formed(*labels.shape[:1], K, *labels.shape[1:]) as formed:
                loss(each).backward()
            assert formed.found == forms
        assert library.restore(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert not library.explain(model).replaced
        dropin.assert_close([loss(model)], [loss(plain)])


def check_loss(model: nn.Module, loss_of: Loss, plain_loss_of: Loss) -> None:
    """The loss is the library's plus 0.4 times the cross entropy of W."""
    images, labels = scenes()
    model.train()
    norms = [
        m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d)
    ]
    for module in norms:
        module.eval()
    kept = {}
    head = context_of(model)
    hook = head.context.weight_head.register_forward_hook(
        lambda _m, _a, out: kept.__setitem__("W", out.detach())
    )
    with torch.no_grad():
        found = loss_of(model, images, labels)
        up = nn.functional.interpolate(
            kept["W"], labels.shape[1:], mode="bilinear", align_corners=head.align_corners
        )
        of_W = nn.functional.cross_entropy(up, labels, ignore_index=255)
        torch.testing.assert_close(found, plain_loss_of(model, images, labels) + 0.4 * of_W)
    hook.remove()


def check_evaluation(model: nn.Module, logits_of: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Stages change the logits, a copy has the same, and nothing of a batch stays alive."""
    images, _ = scenes()
    model.eval()
    head = context_of(model)
    with torch.no_grad():
        one = logits_of(model, images)
        head.stages = 3
        three = logits_of(model, images)
        assert one.shape == three.shape and not torch.equal(one, three)
        assert torch.equal(logits_of(copy.deepcopy(model), images), three)
        head.stages = 1
        assert torch.equal(logits_of(model, images), one)
    assert head._last is None
    keys = list(model.state_dict())
    assert len([key for key in keys if key.endswith("context.memory.memory")]) == 1


def check_reload(
    model: nn.Module, other: nn.Module, logits_of: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """The other model, loaded from what this one saved, has its state and its logits."""
    saved, loaded = model.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    with torch.no_grad():
        results = [logits_of(m.eval(), scenes()[0]) for m in (model, other)]
    assert torch.equal(*results)
