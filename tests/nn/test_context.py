"""Dataset-level context: the recorded module, F_T, projections, layouts, errors."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mcibi_fast
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory, PositionConfidenceAttention
from mcibi_fast.nn.fold import fold_batch_norms, fold_context

RENAMING = [
    ("memory.memory", "memory"),
    ("attention.output", "self_attention.out_project"),
    ("attention.query", "self_attention.query_project"),
    ("attention.key", "self_attention.key_project"),
    ("attention.value", "self_attention.value_project"),
    ("fuse.conv", "bottleneck"),
    ("downsample", "downsample_before_sa"),
]


def released_name(name: str) -> str:
    for own, released in RENAMING:
        if name.startswith(own):
            return released + name.removeprefix(own)
    return name


def relative_error(value, expected) -> float:
    expected = torch.as_tensor(expected)
    return float((value - expected).abs().max() / expected.abs().max())


def recorded_module(recorded, variant) -> DatasetLevelContext:
    module = DatasetLevelContext(
        GaussianMemory(6, 16),
        out_channels=12,
        transform_channels=8,
        hard=variant == "hard",
        downsample=variant == "down",
    )
    state = {
        name: torch.as_tensor(recorded[f"{variant}_sd/{released_name(name)}"])
        for name in module.state_dict()
        if not name.startswith("weight_head.")
    }
    module.load_state_dict(state, strict=False)
    assert len(state) == sum(key.startswith(f"{variant}_sd/") for key in recorded)
    return module.double()


@pytest.mark.parametrize("variant", ["plain", "hard", "down"])
def test_recorded_forward(golden, variant):
    recorded = golden("forward.npz")
    module = recorded_module(recorded, variant).eval()
    seen = {}

    def keep(name):
        def hook(_module, args, output):
            seen[name + "_in"], seen[name] = args, output

        return hook

    for name in ("query", "key", "value", "output"):
        getattr(module.attention, name).register_forward_hook(keep(name))
    features, logits = (torch.as_tensor(recorded[k]) for k in ("feats", "preds"))
    with torch.no_grad():
        augmented = module(features, logits).features
    assert torch.equal(
        module.memory.representations().double(), torch.as_tensor(recorded[f"{variant}_table"])
    )
    for value, key in (
        (seen["query"], "q"),
        (seen["key"], "k"),
        (seen["value"], "v"),
        (seen["query_in"][0], "sa_query_in"),
        (seen["key_in"][0], "sa_key_in"),
        (seen["output"], "sa_out"),
        (augmented, "out"),
    ):
        assert relative_error(value, recorded[f"{variant}_{key}"]) < 1e-10, key


def test_recorded_training_step(golden):
    recorded = golden("forward.npz")
    module = recorded_module(recorded, "plain").train()
    features, logits = (torch.as_tensor(recorded[k]).requires_grad_() for k in ("feats", "preds"))
    out = module.augment(features, logits)
    assert relative_error(out.detach(), recorded["train_out"]) < 1e-10
    out.backward(torch.as_tensor(recorded["train_cotangent"]))
    assert relative_error(features.grad, recorded["train_grad_feats"]) < 1e-10
    assert relative_error(logits.grad, recorded["train_grad_preds"]) < 1e-10
    checked = 0
    for name, parameter in module.named_parameters():
        if not name.startswith("weight_head."):
            expected = recorded[f"train_grad_sd/{released_name(name)}"]
            assert relative_error(parameter.grad, expected) < 1e-10, name
            checked += 1
    for name, buffer in module.named_buffers():
        key = f"train_buf_sd/{released_name(name)}"
        if key in recorded:
            assert relative_error(buffer.double(), recorded[key]) < 1e-10, name
            checked += 1
    assert checked == sum(key.startswith(("train_grad_sd/", "train_buf_sd/")) for key in recorded)


def build(generator, **options) -> DatasetLevelContext:
    module = DatasetLevelContext(
        GaussianMemory(5, 16, form="paper"), **{"transform_channels": 8, **options}
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.eval()


def test_paper_form_is_equation_13(generator):
    module = build(generator, projections="paper", fusion="add")
    features = torch.randn(2, 16, 3, 4, generator=generator, dtype=torch.float64)
    augmented, weight_logits = module(features)

    def project(conv, rows):
        return rows @ conv.weight[:, :, 0, 0].T + conv.bias

    R = features.flatten(2).transpose(1, 2)  # (B, N, Z)
    W = weight_logits.softmax(1).flatten(2).transpose(1, 2)  # (B, N, K)
    C = W @ module.memory.representations().double()  # Eq. 12
    attention = module.attention
    scores = project(attention.query, R) @ project(attention.key, C).transpose(1, 2)
    P = (scores / 8**0.5).softmax(-1)
    C_bi = project(attention.output, P @ project(attention.value, C))
    assert (
        relative_error(augmented.detach(), (R + C_bi).transpose(1, 2).unflatten(2, (3, 4)).detach())
        < 1e-12
    )
    names = {n for n, _ in attention.named_parameters()}
    assert names == {
        f"{m}.{p}" for m in ("query", "key", "value", "output") for p in ("weight", "bias")
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_class_rank_attention_equals_the_general_form(hard, training, generator):
    module = build(generator, projections="paper", hard=hard).train(training)
    features, logits = (
        torch.randn(2, c, 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
        for c in (16, 5)
    )
    cotangent = torch.randn(2, 16, 5, 7, generator=generator, dtype=torch.float64)
    attention = dict(module.attention.named_parameters())
    leaves = [features, *attention.values()] + ([] if hard else [logits])

    def results(C_bi):
        return [C_bi.detach(), *torch.autograd.grad(C_bi, leaves, cotangent)]

    coarse = module.memory.aggregate(logits, hard=hard)
    expected = results(module.attention(features, coarse))
    backward = [] if hard else ["class_rank_attention_backward"]
    with ops_called() as calls:
        got = results(module.aggregate(features, logits))
    assert calls == ["gaussian_table", "class_rank_attention"] + backward
    names = ["C_bi", "features", *attention] + ([] if hard else ["logits"])
    for name, value, truth in zip(names, got, expected, strict=True):
        # The key's bias cancels in the softmax: its gradient is zero but for rounding.
        size = attention["key.weight"].abs().max() if name == "key.bias" else truth.abs().max()
        assert float((value - truth).detach().abs().max() / size.detach()) < 1e-10, name


@contextmanager
def ops_called():
    """Records the names of this package's operators in the order in which they run."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "mcibi_fast":
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield calls


def test_general_form_where_class_rank_attention_does_not_apply(generator):
    features = torch.randn(1, 16, 4, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(1, 5, 4, 4, generator=generator, dtype=torch.float64)
    for options in (
        {"projections": "released"},
        {"projections": "paper", "downsample": True},
        {"projections": "paper", "transform_channels": 4},
    ):
        module = build(generator, **options)
        with torch.no_grad(), ops_called() as calls:
            module.aggregate(features, logits)
        assert "confidence_attention" in calls
        assert "class_rank_attention" not in calls
    released = PositionConfidenceAttention(16, 8)
    with pytest.raises(TypeError, match="linear projections"):
        released.project_classes(features, torch.zeros(5, 16))


@pytest.mark.parametrize("fusion", ["add", "weighted_add", "concatenation"])
@pytest.mark.parametrize("projections", ["paper", "released"])
def test_transforms(fusion, projections, generator):
    module = build(generator, projections=projections, fusion=fusion)
    features = torch.randn(2, 16, 3, 4, generator=generator, dtype=torch.float64)
    augmented, weight_logits = module(features)
    assert augmented.shape == features.shape
    assert weight_logits.shape == (2, 5, 3, 4)
    context = module.aggregate(features, weight_logits)
    both = torch.cat([features, context], dim=1)
    expected = {
        "add": lambda: features + context,
        "weighted_add": lambda: _weighted(module.fuse.weights(both), features, context),
        "concatenation": lambda: module.fuse.conv(both),
    }[fusion]()
    # In evaluation the convolution of both is the sum of two.
    assert relative_error(augmented.detach(), expected.detach()) < 1e-12
    leaves = [*module.fuse.parameters(), *module.attention.parameters()]
    cotangent = torch.randn(augmented.shape, generator=generator, dtype=torch.float64)
    for got, truth in zip(
        torch.autograd.grad(augmented, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(expected, leaves, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
    trained = module.train().augment(features, weight_logits)
    both = torch.cat([features, module.aggregate(features, weight_logits)], dim=1)
    if fusion == "concatenation":
        assert torch.equal(trained, module.fuse.conv(both))


def _weighted(scores, features, context):
    weights = scores.softmax(1)
    return weights[:, :1] * features + weights[:, 1:] * context


def test_given_weights_replace_the_predicted_ones(generator):
    module = build(generator)
    features = torch.randn(1, 16, 3, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(1, 5, 3, 4, generator=generator, dtype=torch.float64)
    own = module(features)
    given = module(features, other)
    assert torch.equal(own.weight_logits, given.weight_logits)
    assert not torch.equal(own.features, given.features)
    assert torch.equal(given.features, module.augment(features, other))


def test_folds_a_memory_of_one_channel() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        context = DatasetLevelContext(GaussianMemory(3, 1), transform_channels=4, downsample=True)
    context = context.eval()
    features = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    expected = context(features)[0]
    folded = copy.deepcopy(context)
    fold_batch_norms(folded)
    torch.testing.assert_close(fold_context(folded)(features)[0], expected)


@pytest.mark.parametrize(
    "options", [{"projections": "paper"}, {"projections": "released"}, {"downsample": True}]
)
def test_detached_weights_get_no_gradient(options, generator):
    """All else gets the same gradient as for weights that are given as numbers."""
    module = build(generator, **options)
    head = {id(parameter) for parameter in module.weight_head.parameters()}
    features = torch.randn(2, 16, 5, 3, generator=generator, dtype=torch.float64)
    inputs = [features.requires_grad_(), *module.parameters()]

    def gradients(augmented):
        return torch.autograd.grad(augmented.square().sum(), inputs, allow_unused=True)

    learnt = gradients(module(features).features)
    given = gradients(module.augment(features, module.weight_head(features).detach()))
    module.detach_weights = True
    for each, by_gathering, got, wanted in zip(
        inputs, learnt, gradients(module(features).features), given, strict=True
    ):
        if id(each) in head:
            assert by_gathering is not None and got is None
        elif wanted is not None:  # the memory has no parameter
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"hard": True}, {"downsample": True}, {"fusion": "add"}])
@pytest.mark.parametrize("projections", ["paper", "released"])
@pytest.mark.parametrize("training", [False, True])
def test_one_state_serves_several_weights(projections, options, training, generator):
    module = build(generator, projections=projections, **options).train(training)
    features = torch.randn(2, 16, 5, 3, generator=generator, dtype=torch.float64)
    state = module.prepare(features)
    for _ in range(2):
        logits = torch.randn(2, 5, 5, 3, generator=generator, dtype=torch.float64)
        fresh = module.augment(features, logits)
        assert torch.equal(module.gather(state, logits), fresh)
        context = module.aggregate(features, logits)
        expected = module.fuse(module.fuse.prepare(features), context)
        assert relative_error(fresh.detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize(
    ("options", "verdict", "op"),
    [
        (
            {"projections": "paper"},
            "class-rank: the projections are linear and K=5 <= T=8",
            "class_rank_attention: ",
        ),
        (
            {"projections": "paper", "hard": True, "transform_channels": 3},
            "class-rank: the projections are linear and each key is one of K=5 classes",
            "class_rank_attention: ",
        ),
        (
            {"projections": "paper", "transform_channels": 4},
            "general: the projections are linear, but K=5 > T=4",
            "confidence_attention: ",
        ),
        (
            {"projections": "released"},
            "general: the projections have ReLU",
            "confidence_attention: ",
        ),
        (
            {"projections": "paper", "downsample": True},
            "general: a stride-2 convolution comes before the attention",
            "confidence_attention: ",
        ),
    ],
)
def test_explain_says_which_form_of_attention_runs(options, verdict, op, generator):
    module = build(generator, **options).train()
    features = torch.randn(1, 16, 4, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(1, 5, 4, 4, generator=generator, dtype=torch.float64)
    before = [b.clone() for b in module.buffers()]
    first, second, *_ = mcibi_fast.explain(module, features, logits).splitlines()
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))
    assert first == f"DatasetLevelContext: {verdict}"
    assert second.startswith(op)
    with torch.no_grad(), ops_called() as calls:
        module.gather(module.prepare(features), logits)
    assert op.removesuffix(": ") in calls  # what it says is what runs


def test_explain_of_the_attention_alone_and_of_other_things(generator):
    features = torch.randn(1, 16, 4, 4, generator=generator)
    report = mcibi_fast.explain(PositionConfidenceAttention(16, 8), features, features)
    assert report.startswith(
        "PositionConfidenceAttention: general: the keys are a feature map\nconfidence_attention: "
    )
    with pytest.raises(ValueError, match=r"explain: no op 'Identity'"):
        mcibi_fast.explain(torch.nn.Identity(), features)


def test_channels_last_gives_the_same(generator):
    module = build(generator)
    features = torch.randn(2, 16, 3, 4, generator=generator, dtype=torch.float64)
    expected = module(features).features.detach()
    module = module.to(memory_format=torch.channels_last)
    got = module(features.to(memory_format=torch.channels_last)).features.detach()
    assert relative_error(got, expected) < 1e-12


def test_wrong_arguments_are_named(generator):
    memory = GaussianMemory(5, 16)
    with pytest.raises(ValueError, match=r"fusion.*'multiply'"):
        DatasetLevelContext(memory, fusion="multiply")
    with pytest.raises(ValueError, match=r"out_channels.*'add'.*16"):
        DatasetLevelContext(memory, fusion="add", out_channels=12)
    with pytest.raises(ValueError, match=r"projections.*'none'"):
        PositionConfidenceAttention(16, projections="none")
    module = build(generator)
    features = torch.randn(1, 16, 3, 4, generator=generator, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight_logits.*\(3, 4\).*\(6, 8\)"):
        module(features, torch.zeros(1, 5, 6, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"logits: 4 classes.*5 rows"):
        module(features, torch.zeros(1, 4, 3, 4, dtype=torch.float64))
