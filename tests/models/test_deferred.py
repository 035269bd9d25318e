"""Models that are built without memory for their weights and filled later, or copied.

What is in no state dict (noise, the memory's steps, class weights) must be there whatever fills the
rest, and whatever new memory holds: here NaN.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mcibi_fast import models
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.nn.transient import transient_tensors
from tests.models.deferred import KINDS, K, build, inputs, outputs, steps, trained
from tests.models.ranks import two_ranks

pytestmark = pytest.mark.usefixtures("poison")
WORKER = Path(__file__).with_name("deferred.py")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> nn.Module:
    """The training state of a run begins anew with its weights, as after loading a checkpoint."""
    fresh = build(kind)
    fresh.load_state_dict(trained(kind).state_dict())
    return fresh


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> list[Tensor]:
    return outputs(copy.deepcopy(model))


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return build(kind)


def assert_computes(found: nn.Module, expected: list[Tensor]) -> None:
    for value, right in zip(outputs(found), expected, strict=True):
        assert torch.equal(value, right)


def test_to_empty_and_load(kind: str, model: nn.Module, expected: list[Tensor]) -> None:
    found = on_meta(kind).to_empty(device="cpu")
    found.load_state_dict(model.state_dict())
    assert_computes(found, expected)


def test_assign(kind: str, model: nn.Module, expected: list[Tensor]) -> None:
    found = on_meta(kind)
    found.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert found.memory.met.all() or kind == "mcibi"
    assert_computes(found, expected)


def test_reset_parameters(kind: str) -> None:
    found, fresh = on_meta(kind).to_empty(device="cpu"), build(kind)
    for module in found.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(t.isfinite().all() for t in found.state_dict().values())
    own = [t for t in found.state_dict().values() if t.is_floating_point()]
    assert len(own) > 20
    assert torch.equal(found.memory.memory, fresh.memory.memory)
    for (name, one), two in zip(
        transient_tensors(found).items(), transient_tensors(fresh).values(), strict=True
    ):
        assert torch.equal(one, two), name


def test_reset_parameters_forgets(kind: str) -> None:
    found, fresh = trained(kind), build(kind)
    found.memory.reset_parameters()
    assert torch.equal(found.memory.memory, fresh.memory.memory)
    assert torch.equal(found.memory.met, fresh.memory.met)
    for name, tensor in transient_tensors(found.memory).items():
        assert torch.equal(tensor, transient_tensors(fresh.memory)[name]), name


def test_init_empty_weights(
    kind: str, model: nn.Module, expected: list[Tensor], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    with accelerate.init_empty_weights(include_buffers=True):
        found = build(kind)
    assert all(t.is_meta for t in found.state_dict().values())
    weights = str(tmp_path / "weights.bin")
    accelerate.utils.load_checkpoint_in_model(found, weights, device_map={"": "cpu"})
    assert_computes(found, expected)


def test_copies(kind: str, model: nn.Module, expected: list[Tensor]) -> None:
    for found in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_computes(found, expected)
    used = copy.deepcopy(model)
    steps(used)
    again = [steps(twin) for twin in (copy.deepcopy(used), pickle.loads(pickle.dumps(used)), used)]
    assert all(torch.equal(a, b) for a, b in zip([*again[0], *again[1]], 2 * again[2], strict=True))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(kind: str, use_buffers: bool) -> None:
    model = build(kind)
    average = AveragedModel(model, use_buffers=use_buffers)
    memories = []
    for seed in (5, 6):
        steps(model, seed=seed)
        average.update_parameters(model)
        memories.append(model.memory.memory.clone())
    mean = torch.stack(memories).mean(0) if use_buffers else memories[-1]
    torch.testing.assert_close(average.module.memory.memory, mean)
    assert average.eval()(inputs()[0]).logits.isfinite().all()


def test_loaded_classes_are_not_initialised_again() -> None:
    """However the memory's values came."""
    memory = GaussianMemory(3, 8, init="pixel")
    memory.memory = torch.tensor([[0.5, 2.0], [0.0, 1.0], [0.1, 1.0]])
    memory.initialize(torch.randn(1, 8, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint8))
    assert memory.memory[0].tolist() == [0.5, 2.0]
    assert memory.met.tolist() == [True, False, True]


def test_transformers_from_pretrained(
    kind: str, model: nn.Module, expected: list[Tensor], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    class Wrapped(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        base_model_prefix = "model"

        def __init__(self, config) -> None:
            super().__init__(config)
            self.model = build(kind)
            self.post_init()

        def forward(self, *args):
            return self.model(*args)

    own = Wrapped(transformers.PretrainedConfig())
    own.model.load_state_dict(model.state_dict())
    own.save_pretrained(tmp_path)
    found = Wrapped.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    assert found.model.memory.met[:4].all()
    assert_computes(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("assign", [False, True])
def test_backbones_of_timm(assign: bool) -> None:
    """Swin has indices outside the state dict."""

    def make() -> models.Segmentor:
        options = {"feats_channels": 8, "transform_channels": 8, "output_stride": 32}
        return models.create("fcn_mcibipp", K, "swin_tiny_patch4_window7_224", **options).eval()

    model, images = make(), inputs()[0]
    with torch.device("meta"):
        found = make()
    if not assign:
        found.to_empty(device="cpu")
    found.load_state_dict(model.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(found(images).logits, model(images).logits)


# ---- FSDP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    if not dist.is_gloo_available():
        pytest.skip("needs a PyTorch with gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.save({kind: trained(kind).state_dict() for kind in KINDS}, folder / "weights.pt")
    with two_ranks(WORKER, folder / "meet", folder / "weights.pt", folder):
        pass
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_fully_shard(kind: str, expected: list[Tensor], ranks: list[dict]) -> None:
    """Both ranks have the same batch, so the result is that of one process alone."""
    for one, two, right in zip(ranks[0][kind], ranks[1][kind], expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_fully_shard_without_weights(kind: str, ranks: list[dict]) -> None:
    memory = build(kind).memory
    right = [memory.memory, memory.met, memory.representations()]
    for found in (rank[f"{kind} fresh"] for rank in ranks):
        assert len(found) == 3  # all parameters are finite
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
