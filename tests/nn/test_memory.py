"""The memory: both forms, the released noise bit for bit, the update, the initialisation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast import ops
from mcibi_fast.nn import GaussianMemory


def relative_error(value, expected) -> float:
    expected = torch.as_tensor(expected)
    return float((value - expected).abs().max() / expected.abs().max())


def batch(generator, *, classes=5, channels=8, batch=2, dtype=torch.float64):
    features = torch.randn(batch, channels, 6, 7, generator=generator, dtype=dtype)
    labels = torch.randint(0, classes, (batch, 24, 28), generator=generator)
    labels[:, :5] = 255
    return features, labels


@pytest.mark.parametrize("channels", [8, 16, 24, 512])
def test_released_table_is_bitwise_that_of_the_released_code(golden, channels):
    recorded = golden("gaussian_table.npz")
    memory = GaussianMemory(5, channels)
    memory.load_state_dict({"memory": torch.as_tensor(recorded["memory"])})
    expected = torch.as_tensor(recorded[f"table_Z{channels}"])
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the recorded bits are those of PyTorch's AVX2 and AVX-512 path")
    assert torch.equal(memory.representations(), expected)
    assert torch.equal(memory.double().representations(), expected)


def test_released_noise_of_182_classes_is_bitwise_the_recorded_one(golden):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the recorded bits are those of PyTorch's AVX2 and AVX-512 path")
    expected = torch.as_tensor(golden("eps_K182_Z512.npz")["eps"])
    assert torch.equal(GaussianMemory(182, 512).representations(), expected)


@pytest.mark.parametrize(
    ("key", "crop", "options"),
    [
        ("memory_ac0", (8, 8, 64, 64), {}),
        ("memory_ac1", (8, 8, 64, 64), {"align_corners": True}),
        (
            "memory_ac0_adjust_lr0.004_base0.9_lr0.01",
            (8, 8, 64, 64),
            {"momentum": 0.9 / 0.01 * 0.004},
        ),
        ("memory_nonsquare_5x7_to_37x50", (5, 7, 37, 50), {}),
        ("memory_ac0_float_labels", (8, 8, 64, 64), {}),
    ],
)
def test_released_update(golden, key, crop, options):
    recorded = golden("update.npz")
    h, w, H, W = crop
    memory = GaussianMemory(7, 16, ignore_index=-100, **options).double()
    memory.load_state_dict({"memory": torch.as_tensor(recorded["memory0"])})
    for step in (0, 1):
        features = torch.as_tensor(recorded["feats8"])[step, ..., :h, :w]
        labels = torch.as_tensor(recorded["labels"])[step, ..., :H, :W]
        memory.update(features, labels)
        assert relative_error(memory.memory, recorded[key][step]) < 1e-10


@pytest.mark.parametrize("align_corners", [False, True])
def test_recorded_class_means(golden, align_corners):
    recorded = golden("update.npz")
    sums, counts = ops.class_feature_sums(
        torch.as_tensor(recorded["feats8"])[0],
        torch.as_tensor(recorded["labels"])[0],
        7,
        ignore_index=-100,
        align_corners=align_corners,
    )
    assert torch.equal(counts, torch.as_tensor(recorded["present_step0"]))
    expected = torch.as_tensor(recorded[f"class_mean_step0_ac{int(align_corners)}"])
    assert torch.equal(counts > 0, ~expected.isnan().any(1))
    mean = sums / counts[:, None]
    seen = counts > 0
    assert relative_error(mean[seen], expected[seen]) < 1e-10


def test_forms():
    paper, released = GaussianMemory(3, 8, form="paper"), GaussianMemory(3, 8)
    assert (paper.unbiased, paper.noise, paper.init) == (False, "fresh", "pixel")
    assert (released.unbiased, released.noise, released.init) == (True, "released", "standard")
    mixed = GaussianMemory(3, 8, form="paper", unbiased=True, noise="released", init="standard")
    assert (mixed.unbiased, mixed.noise, mixed.init) == (True, "released", "standard")
    assert torch.equal(released.memory, torch.tensor([[0.0, 1.0]] * 3))


def test_paper_form_divides_by_z(generator):
    features, labels = batch(generator)
    for unbiased in (False, True):
        memory = GaussianMemory(5, 8, form="paper", unbiased=unbiased, momentum=1.0).double()
        memory.update(features, labels)
        upsampled = F.interpolate(features, labels.shape[1:], mode="bilinear").movedim(1, -1)
        mean = torch.stack([upsampled[labels == k].mean(0) for k in range(5)])
        expected = torch.stack([mean.mean(1), mean.std(1, correction=int(unbiased))], dim=1)
        assert relative_error(memory.memory, expected) < 1e-12


def test_momentum_is_a_plain_attribute(generator):
    features, labels = batch(generator)
    memory = GaussianMemory(5, 8).double()
    memory.momentum = 0.0
    memory.update(features, labels)
    assert torch.equal(memory.memory, torch.tensor([[0.0, 1.0]] * 5, dtype=torch.float64))
    memory.momentum = float("nan")
    with pytest.raises(ValueError, match=r"momentum"):
        memory.update(features, labels)


def test_fresh_noise_changes_per_step_and_is_fixed_at_evaluation(generator):
    features, labels = batch(generator)
    memory = GaussianMemory(5, 8, form="paper", momentum=0.0).double()
    first = memory.representations()
    assert torch.equal(first, memory.representations())  # within a step
    evaluated = memory.eval().representations()
    memory.train().update(features, labels)
    assert not torch.equal(first, memory.representations())
    assert torch.equal(evaluated, memory.eval().representations())
    assert not torch.equal(evaluated, first)


def test_fixed_noise_is_the_same_in_training_and_evaluation(generator):
    memory = GaussianMemory(5, 8, noise="fixed", seed=3)
    first = memory.representations()
    memory.update(*batch(generator, dtype=torch.float32))
    memory.load_state_dict({"memory": torch.tensor([[0.0, 1.0]] * 5)})
    assert torch.equal(first, memory.eval().representations())
    assert not torch.equal(first, GaussianMemory(5, 8, noise="fixed", seed=4).representations())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_aggregate_gathers_the_representations(form, generator):
    memory = GaussianMemory(5, 8, form=form).eval()
    logits = torch.randn(2, 5, 3, 4, generator=generator)
    table = memory.representations()
    expected = torch.einsum("bkhw,kz->bzhw", logits.softmax(1), table)
    torch.testing.assert_close(memory.aggregate(logits), expected, rtol=0, atol=1e-5)
    winners = table[logits.argmax(1)].movedim(-1, 1)
    torch.testing.assert_close(memory.aggregate(logits, hard=True), winners, rtol=0, atol=1e-5)


def test_initialize_takes_one_pixel_per_class(generator):
    features, labels = batch(generator, classes=4)
    memory = GaussianMemory(5, 8, form="paper").double()
    memory.initialize(features, labels)
    assert memory.met.tolist() == [True] * 4 + [False]
    assert memory.memory[4].tolist() == [0, 1]
    upsampled = F.interpolate(features, labels.shape[1:], mode="bilinear").movedim(1, -1)
    pixels = torch.stack([upsampled.mean(-1), upsampled.std(-1, correction=0)], dim=-1)
    for k in range(4):
        distances = (pixels[labels == k] - memory.memory[k]).abs().amax(1)
        assert distances.min() < 1e-12


def test_initialize_sets_only_classes_not_met_before(generator):
    features, labels = batch(generator)
    memory = GaussianMemory(5, 8, form="paper").double()
    memory.initialize(features, torch.where(labels == 2, 255, labels))
    before = memory.memory.clone()
    memory.initialize(features + 1, labels)
    kept = [0, 1, 3, 4]
    assert torch.equal(memory.memory[kept], before[kept])
    assert not torch.equal(memory.memory[2], before[2])
    assert memory.met.all()


def test_initialize_is_repeatable_and_seeded(generator):
    features, labels = batch(generator)

    def initialized(seed):
        memory = GaussianMemory(5, 8, form="paper", seed=seed)
        memory.initialize(features, labels)
        return memory.memory

    assert torch.equal(initialized(0), initialized(0))
    assert not torch.equal(initialized(0), initialized(1))


def test_loading_marks_the_classes_as_met():
    memory = GaussianMemory(3, 8, form="paper")
    assert not memory.met.any()
    memory.load_state_dict(GaussianMemory(3, 8).state_dict())
    assert memory.met.all()


def test_memory_is_the_only_state_and_stays_float32():
    memory = GaussianMemory(3, 8)
    expected = memory.representations()
    assert list(memory.state_dict()) == ["memory"]
    assert not list(memory.parameters())
    memory.load_state_dict({"memory": torch.tensor([[0.1, 1.0]] * 3)})
    for convert in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        converted = convert(copy.deepcopy(memory))
        assert converted.memory.dtype == torch.float32
        assert torch.equal(converted.memory, memory.memory)
        assert converted.representations().dtype == torch.float32
    doubled = copy.deepcopy(memory).double()
    assert doubled.memory.dtype == torch.float64
    assert doubled.half().memory.dtype == torch.float64
    assert torch.equal(doubled.float().memory, memory.memory)
    assert torch.equal(GaussianMemory(3, 8).double().half().float().representations(), expected)


def test_memory_can_be_built_on_meta_and_materialised():
    with torch.device("meta"):
        memory = GaussianMemory(3, 8)
    memory.to_empty(device="cpu")
    memory.load_state_dict({"memory": torch.tensor([[0.0, 1.0]] * 3)})
    assert torch.equal(memory.representations(), GaussianMemory(3, 8).representations())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_global_generator_is_left_alone(form, generator):
    features, labels = batch(generator)
    before = torch.get_rng_state()
    memory = GaussianMemory(5, 8, form=form).double()
    memory.initialize(features, labels)
    memory.update(features, labels)
    memory.representations()
    assert torch.equal(before, torch.get_rng_state())


def test_update_between_forward_and_backward(generator):
    features, labels = batch(generator)
    memory = GaussianMemory(5, 8, form="paper").double()
    logits = torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 8, 6, 7, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(memory.aggregate(logits), logits, cotangent)
    gathered = memory.aggregate(logits)
    memory.update(features, labels)
    (grad,) = torch.autograd.grad(gathered, logits, cotangent)
    assert torch.equal(grad, expected)


def test_module_can_be_copied_and_saved(generator):
    memory = GaussianMemory(5, 8, form="paper")
    memory.update(*batch(generator, dtype=torch.float32))
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(memory), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin.representations(), memory.representations())


def test_wrong_arguments_are_named(generator):
    features, labels = batch(generator)
    memory = GaussianMemory(5, 8).double()
    with pytest.raises(ValueError, match=r"form.*'paper'.*'other'"):
        GaussianMemory(5, 8, form="other")
    with pytest.raises(ValueError, match=r"noise.*'loud'"):
        GaussianMemory(5, 8, noise="loud")
    with pytest.raises(ValueError, match=r"init.*'zero'"):
        GaussianMemory(5, 8, init="zero")
    for call in (memory.update, memory.initialize):
        with pytest.raises(ValueError, match=r"features.*\(B, 8, h, w\).*\(2, 7, 6, 7\)"):
            call(features[:, :7], labels)
    with pytest.raises(ValueError, match=r"labels"):
        memory.update(features, labels[:1])
    labels[1, 9, 3] = 200
    with pytest.raises(ValueError, match=r"labels.*200.*b=1, y=9, x=3"):
        memory.update(features, labels)
