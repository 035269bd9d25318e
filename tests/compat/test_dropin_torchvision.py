"""`compat.torchvision` on torchvision's own classes, with a backbone of two layers."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import DeepLabV3, fcn, lraspp
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from mcibi_fast.compat import torchvision as library
from mcibi_fast.compat.upsampled import Upsampled
from tests.compat import dropin
from tests.compat.dropin import K

ROOT = Path(__file__).resolve().parents[2]


class Backbone(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.names = names

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        low = self.first(x).relu()
        return OrderedDict(zip(self.names, (low, self.second(low).relu()), strict=True))


def build(kind: str, classes: int = K) -> nn.Module:
    torch.manual_seed(0)
    if kind == "lraspp":
        return lraspp.LRASPP(Backbone(("low", "high")), 8, 8, classes, 16)
    backbone, auxiliary = Backbone(("aux", "out")), fcn.FCNHead(8, classes)
    if kind == "fcn":
        return fcn.FCN(backbone, fcn.FCNHead(8, classes), auxiliary)
    return DeepLabV3(backbone, DeepLabHead(8, classes), auxiliary)


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("kind", ["fcn", "deeplabv3", "lraspp"])
def test_agrees(kind: str, generator: torch.Generator) -> None:
    x, y = dropin.images(generator), dropin.labels(generator)
    criterion = nn.CrossEntropyLoss(ignore_index=255, label_smoothing=0.1)

    def loss_of(model: nn.Module) -> Tensor:
        return sum(w * criterion(out, y) for w, out in zip((1, 0.4), model(x).values()))  # noqa: B905

    model = dropin.without_dropout(build(kind)).double()
    fast = dropin.check_accelerate(library, model, loss_of, lambda m: m(x)["out"].argmax(1))
    with torch.no_grad():
        assert torch.equal(fast(x)["out"][0].argmax(0), model(x)["out"][0].argmax(0))
        dropin.assert_close([fast(x)["out"] + 0], [model(x)["out"] + 0])


def test_under_autocast_and_accumulated_gradients(generator: torch.Generator) -> None:
    """Two halves of a batch, in bfloat16 where autocast says so: the loss is in float32."""
    x, y = dropin.images(generator, torch.float32), dropin.labels(generator)
    slow = dropin.without_dropout(build("fcn")).eval()
    exact, fast = build("fcn").double().eval(), library.accelerate(build("fcn").eval())
    results = []
    for model in (exact, slow, fast):
        for i in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
                out = model(x[i : i + 1].to(next(model.parameters()).dtype))["out"]
                loss = F.cross_entropy(out, y[i : i + 1], ignore_index=255) / 2
            assert loss.dtype == (torch.float64 if model is exact else torch.float32)
            loss.backward()
        results.append(
            torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        )
    errors = [float((r - results[0]).norm()) for r in results[1:]]
    assert errors[1] <= 2 * errors[0]


def test_one_class_and_other_models_are_errors() -> None:
    with pytest.raises(ValueError, match="one class: its upsampled logits are no larger"):
        library.accelerate(build("fcn", classes=1))
    with pytest.raises(ValueError, match=r"nothing in Linear .*FCN, DeepLabV3 and LRASPP"):
        library.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is accelerated"):
        library.restore(build("fcn"))
    with pytest.raises(ValueError, match="holds no model of torchvision"):
        library.explain(nn.Linear(2, 2))


@pytest.mark.slow
def test_compiled_exported_and_traced(generator: torch.Generator) -> None:
    x = dropin.images(generator)
    slow = build("fcn").double().eval()
    fast = library.accelerate(build("fcn").double().eval())
    expected = slow(x)["out"]
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    y = dropin.labels(generator)

    def loss_of(model: nn.Module) -> Tensor:
        return sum(F.cross_entropy(out, y, ignore_index=255) for out in model(x).values())

    dropin.assert_close(dropin.step(compiled, loss_of), dropin.step(slow, loss_of))
    # And the other way round: the loss is compiled, the model is not.
    loss = torch.compile(F.cross_entropy, backend="aot_eager")
    out = fast(x)["out"]
    assert type(out) is Upsampled
    dropin.assert_close(
        [loss(out, y, ignore_index=255)], [F.cross_entropy(expected, y, ignore_index=255)]
    )
    dropin.assert_close([torch.export.export(fast, (x,)).module()(x)["out"]], [expected])


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel, also where it puts a node of its own behind the outputs."""
    command = [sys.executable, "-m", "tests.compat.dropin_worker", str(tmp_path / "store")]
    workers = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [w.communicate(timeout=300)[0].split() for w in workers] == [["agreed"] * 3] * 2
