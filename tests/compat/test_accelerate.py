"""`accelerate` on stand-ins with the released package's names, against the stand-ins untouched.

The stand-ins do what the released classes do, and the memory is also held to the outputs that were
recorded from those.
"""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_fast.compat import accelerate as module_under_test
from mcibi_fast.compat.accelerate import accelerate
from mcibi_fast.training.processes import leave_group
from tests.compat.released_package import (
    MOMENTUM,
    FeaturesMemoryV2,
    K,
    MCIBIPlusPlus,
    SelfAttentionBlock,
    Z,
)

OPTIONS = [{}, {"hard": True}, {"downsample": True}]


@torch.no_grad()
def scramble(module, generator):
    """Weights, statistics and a memory in which every part shows in the output."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("memory"):
            tensor[:, 0].normal_(generator=generator)
            tensor[:, 1].uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3, generator=generator)
    return module


@pytest.fixture(autouse=True)
def own_random_state():
    """The stand-ins seed the global generator, as the released code does."""
    with torch.random.fork_rng(devices=[]):
        yield


def pair(kind, generator, **options):
    """A module, and a copy of it made fast; float64, evaluation mode."""
    slow = scramble(kind(**options), generator).double().eval()
    return slow, accelerate(copy.deepcopy(slow))


def inputs(generator, size=(5, 7)):
    feats, preds = (
        torch.randn(2, c, *size, generator=generator, dtype=torch.float64) for c in (Z, K)
    )
    return feats.relu(), 3 * preds


def sample(generator, size=(45, 62)):
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    labels = torch.randint(K - 1, (2, *size), generator=generator)  # the last class is absent
    labels[0, :3] = 255
    return SimpleNamespace(images=images, getannotations=lambda: {"seg_targets": labels})


def assert_close(value, expected, tolerance=1e-10):
    assert value.shape == expected.shape and value.dtype == expected.dtype
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_memory_forward(options, generator):
    slow, fast = pair(FeaturesMemoryV2, generator, **options)
    feats, preds = inputs(generator)
    for got, expected in zip(fast(feats, preds), slow(feats, preds), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_memory_training(options, generator):
    slow, fast = pair(FeaturesMemoryV2, generator, **options)
    feats, preds = inputs(generator)
    cotangent = torch.randn(feats.shape, generator=generator, dtype=torch.float64)
    results = []
    for module in (fast.train(), slow.train()):
        leaves = [feats.clone().requires_grad_(), preds.clone().requires_grad_()]
        module(*leaves)[1].backward(cotangent)
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        # Hard weights pass no gradient on.
        gradients += [torch.zeros(1) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append(gradients + [b.double() for b in module.buffers()])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "hard", "down"])
def test_memory_reproduces_the_recorded_outputs(form, golden):
    recorded = {k: torch.as_tensor(v) for k, v in golden("forward.npz").items()}
    prefix = f"{form}_sd/"
    state = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
    module = FeaturesMemoryV2(12, hard=form == "hard", downsample=form == "down")
    module.load_state_dict(state)
    table, output = accelerate(module.double().eval())(recorded["feats"], recorded["preds"])
    assert_close(output, recorded[f"{form}_out"])
    if form == "plain":
        assert torch.equal(table, recorded["plain_table"])


@pytest.mark.parametrize("adjusted", [False, True])
def test_update_reproduces_the_recorded_memories(adjusted, golden):
    recorded = {k: torch.as_tensor(v) for k, v in golden("update.npz").items()}
    module = accelerate(FeaturesMemoryV2(num_classes=7)).double()
    module.memory.data = recorded["memory0"].double()
    config, key = {"momentum_cfg": MOMENTUM}, "memory_ac0"
    if adjusted:
        momentum = {"base_momentum": 0.9, "base_lr": 0.01, "adjust_by_learning_rate": True}
        config = {"momentum_cfg": momentum, "learning_rate": 0.004}
        key = "memory_ac0_adjust_lr0.004_base0.9_lr0.01"
    for step in range(2):
        before = module.memory
        features = recorded["feats8"][step].double()
        features = F.interpolate(features, size=(64, 64), mode="bilinear", align_corners=False)
        module.update(features, recorded["labels"][step].float(), **config)
        assert_close(module.memory.data, recorded[key][step].double())
        assert module.memory is not before and not module.memory.requires_grad


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"out_project": False}, {"matmul_norm": False}, {"downsample": nn.AvgPool2d(2)}],
)
def test_attention(options, generator):
    slow, fast = pair(SelfAttentionBlock, generator, **options)
    query, _ = inputs(generator)
    key, _ = inputs(generator, (4, 9))
    assert_close(fast(query, key), slow(query, key))


@pytest.mark.parametrize("options", OPTIONS)
def test_model_in_training(options, generator):
    slow, fast = pair(MCIBIPlusPlus, generator, **options)
    for dropout in (m for m in [*slow.modules(), *fast.modules()] if isinstance(m, nn.Dropout2d)):
        dropout.p = 0.0
    for _ in range(2):
        data = sample(generator)
        results = []
        for model in (fast.train(), slow.train()):
            model.zero_grad()
            loss = model(data, learning_rate=0.01).loss
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            results.append([loss.detach(), *gradients])
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected, 1e-9)
        # The first batch's statistics are in the memory that the second one reads.
        assert_close(fast.memory_module.memory.data, slow.memory_module.memory.data)
        assert torch.equal(fast.memory_module.memory[K - 1], slow.memory_module.memory[K - 1])


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_model_in_evaluation(options, generator):
    slow, fast = pair(MCIBIPlusPlus, generator, **options)
    slow.mode = fast.mode = "TEST"
    data = sample(generator)
    logits = fast(data).seg_logits
    assert type(logits) is torch.Tensor
    assert_close(logits, slow(data).seg_logits)


def one_rank(rank, rendezvous):
    """A step of a wrapped model on this rank's images; each rank has classes the other lacks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    slow, fast = pair(MCIBIPlusPlus, torch.Generator().manual_seed(0))
    slow, fast = (nn.parallel.DistributedDataParallel(model.train()) for model in (slow, fast))
    assert accelerate(fast) is fast
    for dropout in (m for m in [*slow.modules(), *fast.modules()] if isinstance(m, nn.Dropout2d)):
        dropout.p = 0.0
    data = sample(torch.Generator().manual_seed(rank + 1))
    labels = data.getannotations()["seg_targets"]
    labels[labels == rank] = 255
    gradients, memories = [], []
    for model in (fast, slow):
        model(data, learning_rate=0.01).loss.backward()
        gradients.append(model.module.backbone_net[0].weight.grad)
        memories.append(model.module.memory_module.memory.data)
    assert_close(*gradients)
    assert_close(*memories)
    everywhere = [torch.empty_like(memories[0]) for _ in range(2)]
    dist.all_gather(everywhere, memories[0])
    assert torch.equal(*everywhere)
    leave_group()


@pytest.mark.slow
def test_two_processes_average_their_memories(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("needs a PyTorch with gloo")
    torch.multiprocessing.spawn(one_rank, (tmp_path / "rendezvous",), nprocs=2)


class Sizes(TorchDispatchMode):
    """The shape of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
                self.seen.add(tuple(tensor.shape))
        return out


def test_upsampled_features_and_scores_are_never_formed(generator):
    """On maps that are large enough for the fused attention, of over 2^22 scores."""
    slow, fast = pair(MCIBIPlusPlus, generator)
    data, sizes = sample(generator, (152, 156)), {}
    for name, model in (("slow", slow), ("fast", fast)):
        with Sizes() as mode:
            model.train()(data, learning_rate=0.01)
        sizes[name] = mode.seen
    upsampled, scores = (2, Z, 152, 156), (2, 1482, 1482)
    assert {upsampled, scores} <= sizes["slow"]
    assert not {upsampled, scores} & sizes["fast"]


def test_whoever_else_looks_at_the_upsampled_features_sees_them(generator):
    R = torch.randn(2, Z, 5, 7, generator=generator, requires_grad=True)
    bottleneck = nn.ReLU()
    module_under_test._mark_output(bottleneck)
    size = {"size": (11, 13), "mode": "bilinear", "align_corners": True}
    expected = F.interpolate(R.relu(), **size)
    marked = bottleneck(R)
    assert F.interpolate(marked, **size).requires_grad
    assert torch.equal(F.interpolate(marked, **size), expected)
    assert type(marked + 1) is torch.Tensor
    with torch.no_grad():
        later = F.interpolate(marked, **size)
        assert later.shape == expected.shape and later.dtype == expected.dtype
        assert torch.equal(later.permute(0, 2, 3, 1), expected.permute(0, 2, 3, 1))
        assert torch.equal(torch.cat([later, later]), torch.cat([expected, expected]))
        assert torch.equal(F.interpolate(marked, scale_factor=2), F.interpolate(R.relu(), (10, 14)))


def test_the_global_generator_is_left_alone(generator):
    slow, fast = pair(MCIBIPlusPlus, generator)
    data = sample(generator)
    for model in (slow, fast):
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout2d)):
            dropout.p = 0.0
        before = torch.get_rng_state()
        model.train()(data, learning_rate=0.01)
        untouched = torch.equal(before, torch.get_rng_state())
        assert untouched == (model is fast)


def test_names_weights_hooks_and_classes_stay(generator):
    slow = scramble(MCIBIPlusPlus(), generator)
    keys, weights = list(slow.state_dict()), list(slow.parameters())
    calls = []
    slow.memory_module.register_forward_hook(lambda *_: calls.append(1))
    assert accelerate(slow) is slow
    assert list(slow.state_dict()) == keys
    assert all(a is b for a, b in zip(slow.parameters(), weights, strict=True))
    assert isinstance(slow.memory_module, FeaturesMemoryV2)
    assert isinstance(slow.memory_module.self_attention, SelfAttentionBlock)
    kinds = [type(m) for m in slow.modules()]
    accelerate(slow)
    assert [type(m) for m in slow.modules()] == kinds
    assert len(slow.bottleneck._forward_hooks) == 1
    slow.memory_module(*(x.float() for x in inputs(generator)))
    assert calls == [1]


@torch.no_grad()
def test_copies_and_pickles(generator):
    _, fast = pair(MCIBIPlusPlus, generator)
    data = sample(generator)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ):
        assert [type(m) for m in copied.modules()] == [type(m) for m in fast.modules()]
        assert copied.memory_module.memory is not fast.memory_module.memory
        with Sizes() as mode:
            copied.train()(data, learning_rate=0.01)
        assert (2, Z, 45, 62) not in mode.seen
        copied.mode = "TEST"
        copied.load_state_dict(fast.state_dict())
        fast.mode = "TEST"
        assert torch.equal(copied.eval()(data).seg_logits, fast.eval()(data).seg_logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_precisions(dtype, generator):
    """Against float64: at most twice the error of the stand-in in the same dtype."""
    slow, fast = pair(FeaturesMemoryV2, generator)
    feats, preds = (x.to(dtype) for x in inputs(generator))
    slow, fast = slow.to(dtype), fast.to(dtype)
    exact = copy.deepcopy(slow).double()(feats.double(), preds.double())[1]
    errors = [float((m(feats, preds)[1] - exact).abs().max()) for m in (fast, slow)]
    assert errors[0] <= 2 * errors[1]
    labels = torch.randint(K, (2, 5, 7), generator=generator)
    fast.update(feats, labels, momentum_cfg=MOMENTUM)
    assert fast.memory.dtype == dtype and fast.memory.isfinite().all()


def test_under_autocast(generator):
    slow, fast = pair(MCIBIPlusPlus, generator)
    exact = copy.deepcopy(slow).train()
    data = sample(generator)
    exact(data, learning_rate=0.01)
    data.images = data.images.float()
    slow, fast = slow.float(), fast.float()
    for model in (slow, fast):
        with torch.autocast("cpu", torch.bfloat16):
            model.train()(data, learning_rate=0.01).loss.backward()
    memories = [m.memory_module.memory.data for m in (exact, fast, slow)]
    errors = [(m - memories[0]).abs().max() for m in memories[1:]]
    assert errors[0] <= 2 * errors[1]


def test_inference_mode_first_and_training_later(generator):
    module_under_test._unit_table.cache_clear()
    _, fast = pair(MCIBIPlusPlus, generator)
    data = sample(generator)
    fast.mode = "TEST"
    with torch.inference_mode():
        fast(data)
    fast.mode = "TRAIN"
    fast.train()(data, learning_rate=0.01).loss.backward()
    assert fast.backbone_net[0].weight.grad.abs().sum() > 0


class Narrow(SelfAttentionBlock):
    """A subclass with a forward of its own."""

    def forward(self, query_feats, key_feats):
        return super().forward(query_feats, key_feats)[:, :3]


class Named(SelfAttentionBlock):
    """A subclass with nothing of its own."""


Same = type(
    "SelfAttentionBlock",
    (SelfAttentionBlock,),
    {
        "__doc__": "Of the same name, with a forward of its own, as ISANet's.",
        "forward": lambda self, x: SelfAttentionBlock.forward(self, x, x)[:, :3],
    },
)


class OwnUpdate(FeaturesMemoryV2):
    """A memory with an update of its own."""

    def update(self, *inputs, **options):
        self.updates = 1


@torch.no_grad()
def test_a_subclass_of_the_same_name_keeps_its_method(generator):
    module = scramble(Same(), generator).double().eval()
    feats, _ = inputs(generator)
    before = module(feats)
    with pytest.raises(ValueError, match=r"holds no FeaturesMemoryV2"):
        accelerate(module)
    assert type(module) is Same and torch.equal(module(feats), before)


@torch.no_grad()
def test_what_a_subclass_inherits_is_replaced(generator):
    slow, fast = pair(OwnUpdate, generator)
    feats, preds = inputs(generator)
    before = torch.get_rng_state()
    got = fast(feats, preds)
    assert torch.equal(before, torch.get_rng_state())  # our forward, which seeds nothing
    assert_close(got[1], slow(feats, preds)[1])
    fast.update(feats, None, momentum_cfg=MOMENTUM)
    assert fast.updates == 1
    copied = pickle.loads(pickle.dumps(fast))
    assert_close(copied(feats, preds)[1], got[1], 0)
    copied.update(feats, None)


@torch.no_grad()
def test_subclasses(generator):
    narrow, named = Narrow(), Named()
    accelerate(nn.ModuleList([narrow, named]))
    assert type(narrow) is Narrow and type(named) is not Named and isinstance(named, Named)


def test_nothing_to_accelerate():
    with pytest.raises(ValueError, match=r"accelerate: Conv2d holds no FeaturesMemoryV2"):
        accelerate(nn.Conv2d(3, 3, 1))
    # The same name in another package, with other attributes.
    other = type("SelfAttentionBlock", (nn.Conv2d,), {"forward": nn.Conv2d.forward})
    with pytest.raises(ValueError, match=r"holds no FeaturesMemoryV2"):
        accelerate(nn.Sequential(other(3, 3, 1)))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        accelerate({})


def test_labels_of_no_class_are_named(generator):
    memory = accelerate(FeaturesMemoryV2())
    labels = torch.randint(K, (2, 5, 7), generator=generator)
    labels[1, 2, 3] = -1
    with pytest.raises(ValueError, match=r"labels: value -1 at \(b=1, y=2, x=3\)"):
        memory.update(torch.zeros(2, Z, 5, 7), labels, momentum_cfg=MOMENTUM)


def test_restore_gives_the_released_methods_back(generator):
    """Classes, hooks and outputs; nothing of ours runs any more."""
    slow, fast = pair(MCIBIPlusPlus, generator)
    kinds = [type(m) for m in slow.modules()]
    assert module_under_test.restore(fast) is fast
    assert [type(m) for m in fast.modules()] == kinds
    assert not fast.bottleneck._forward_hooks
    data = sample(generator, (44, 60))
    with Sizes() as mode:
        fast.train()(data, learning_rate=0.01)
    assert {(2, Z, 44, 60), (2, 165, 165)} <= mode.seen
    with pytest.raises(ValueError, match="nothing in MCIBIPlusPlus is accelerated"):
        module_under_test.restore(fast)


def test_explain(generator):
    class Own(SelfAttentionBlock):
        def forward(self, query_feats, key_feats):
            return query_feats

    slow, fast = pair(MCIBIPlusPlus, generator)
    before, after = module_under_test.explain(slow), module_under_test.explain(fast)
    names = ["memory_module", "memory_module.self_attention"]
    assert [place.name for place in before.replaceable] == names == [p.name for p in after.replaced]
    assert not before.replaced and not after.replaceable
    assert "memory_module: FeaturesMemoryV2: forward reads a fixed table" in str(after)
    fast.own = copy.copy(slow.memory_module.self_attention)
    fast.own.__class__ = Own
    (left,) = module_under_test.explain(fast).left_alone
    assert (left.name, left.why) == ("own", "it has methods of its own")
    with pytest.raises(ValueError, match="explain: Linear holds no model of sssegmentation"):
        module_under_test.explain(nn.Linear(2, 2))
