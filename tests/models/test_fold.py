"""Folded models: equal outputs, what is folded, no training, saving, tracing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mcibi_fast
from mcibi_fast import models
from mcibi_fast.compat import sssegmentation
from mcibi_fast.models import MCIBIPPHead, Segmentor
from mcibi_fast.nn.blocks import use_leaky_relu
from mcibi_fast.nn.fold import fold_batch_norms
from mcibi_fast.nn.within_image import ASPP
from tests.models.disturbed import disturb


def small_head(generator, *, classes=5, within=False, negative_slope=0.0, **options) -> MCIBIPPHead:
    options = {"feats_channels": 16, "transform_channels": 8, **options}
    within_image = ASPP(12, options["feats_channels"], dilations=(1, 2)) if within else None
    head = MCIBIPPHead(classes, [8, 12], within_image=within_image, **options)
    if negative_slope:
        use_leaky_relu(head, negative_slope)
    return disturb(head, generator).eval()


def maps(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def feature_maps(generator, dtype=torch.float64):
    return [maps(generator, 2, 8, 5, 7, dtype=dtype), maps(generator, 2, 12, 5, 7, dtype=dtype)]


def relative_error(value, expected) -> float:
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


VARIANTS = {
    "plain": {},
    "aspp": {"within": True},
    "hard": {"hard": True},
    "downsample": {"downsample": True},
    "hard_downsample": {"hard": True, "downsample": True},
    "add": {"fusion": "add"},
    "weighted_add": {"fusion": "weighted_add"},
    "more_classes_than_width": {"transform_channels": 3},
    "more_classes_than_channels": {"classes": 19, "hard": True},
    "one_class": {"classes": 1},
    "leaky": {"negative_slope": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("projections", ["paper", "released"])
@pytest.mark.parametrize("form", ["paper", "released"])
@torch.no_grad()
@pytest.mark.thinned(together=2)
def test_equal_in_float64(form, projections, variant, generator):
    head = small_head(generator, form=form, projections=projections, **VARIANTS[variant]).double()
    folded, features = head.fold(), feature_maps(generator)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    previous = maps(generator, 2, head.context.memory.num_classes, 10, 14)
    for options in ({"stages": 1}, {"stages": 3}, {"stages": 2, "previous_logits": previous}):
        got, expected = folded(features, **options), head(features, **options)
        assert relative_error(got.logits, expected.logits) < 1e-10
        assert relative_error(got.weight_logits, expected.weight_logits) < 1e-10
    if head.within_image is not None:
        assert relative_error(got.context_logits, expected.context_logits) < 1e-10


@pytest.mark.parametrize("name", ["mcibipp_fcn.npz", "mcibipp_aspp.npz"])
@torch.no_grad()
def test_a_released_checkpoint_folded_reproduces_every_stage(name, golden):
    recorded = {key: torch.as_tensor(value) for key, value in golden(name).items()}
    state = {k.removeprefix("sd/"): v for k, v in recorded.items() if k.startswith("sd/")}
    model = sssegmentation.load({"model": state}).double().fold()
    for stages in (1, 2, 3):
        logits = model(recorded["images"], stages=stages).logits
        assert relative_error(logits, recorded[f"stage{stages}_logits"]) < 1e-10


@pytest.mark.parametrize("form", ["paper", "released"])
@torch.no_grad()
def test_rounds_no_more_than_twice_as_much_in_float32(form, generator):
    head = small_head(generator, form=form, feats_channels=64, transform_channels=32, classes=19)
    features = feature_maps(generator)
    expected = copy.deepcopy(head).double()(features, stages=2).logits
    single = [f.float() for f in features]
    own = relative_error(head(single, stages=2).logits, expected)
    assert relative_error(head.fold()(single, stages=2).logits, expected) <= 2 * own


@pytest.mark.parametrize("form", ["paper", "released"])
@torch.no_grad()
def test_16_bit_and_channels_last(form, generator):
    head, features = small_head(generator, form=form), feature_maps(generator, torch.float32)
    expected = head(features, stages=2).logits
    last = [f.to(memory_format=torch.channels_last) for f in features]
    folded = head.fold().to(memory_format=torch.channels_last)
    assert relative_error(folded(last, stages=2).logits, expected) < 1e-5
    for half in (head.fold().bfloat16(), head.bfloat16().fold()):
        logits = half([f.bfloat16() for f in features], stages=2).logits
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits, expected) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        logits = folded(features, stages=2).logits
    assert relative_error(logits, expected) < 0.1


def weight_shapes(run) -> list[tuple[int, ...]]:
    """Of the convolutions that ``run`` computes, in their order."""
    shapes = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                shapes.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Convolutions():
        run()
    return shapes


def test_what_a_stage_still_computes(generator):
    Z, T, K = 16, 8, 5
    R, W = maps(generator, 1, Z, 5, 7), maps(generator, 1, K, 5, 7)
    expected = {
        "paper": [(Z, K, 3, 3)],  # attention on weights, straight into the fusing convolution
        "released": [(T, T, 1, 1), (Z, T, 1, 1), (Z, Z, 3, 3)],  # second key block, output, F_T
    }
    for form, shapes in expected.items():
        context = small_head(generator, form=form).double().fold().context
        state = context.prepare(R)
        assert weight_shapes(lambda c=context, s=state: c.gather(s, W)) == shapes
    with pytest.raises(ValueError, match=r"weight_logits.*\(5, 7\).*\(10, 14\)"):
        context.gather(state, maps(generator, 1, K, 10, 14))


def test_explain(generator):
    R, W = maps(generator, 1, 16, 5, 7), maps(generator, 1, 5, 5, 7)
    linear = "FoldedClassContext: class-rank: the projections are linear and K=5 <= T=8\n"
    general = "FoldedPixelContext: general: the projections have ReLU\n"
    hard = "FoldedClassContext: class-rank: each key is one of K=5 classes\n"
    for options, verdict, op in (
        ({"form": "paper"}, linear, "class_rank_attention: "),
        ({"form": "released"}, general, "confidence_attention: "),
        ({"form": "released", "hard": True}, hard, "class_rank_attention: "),
    ):
        context = small_head(generator, **options).double().fold().context
        assert mcibi_fast.explain(context, R, W).startswith(verdict + op)


def build(generator, form="paper", backbone="test_resnet", **options) -> Segmentor:
    options = {"feats_channels": 16, "transform_channels": 8, **options}
    model = models.create("fcn_mcibipp", 5, backbone, form=form, **options)
    return disturb(model, generator).eval()


@pytest.mark.parametrize(
    ("backbone", "stride"), [("test_resnet", 8), ("resnet10t", 8), ("test_convnext", 32)]
)
@torch.no_grad()
def test_whole_models(backbone, stride, generator):
    model = build(generator, backbone=backbone, output_stride=stride).double()
    images = maps(generator, 2, 3, 64, 96)
    folded = model.fold()
    assert relative_error(folded(images, stages=2).logits, model(images, stages=2).logits) < 1e-10
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@torch.no_grad()
def test_a_backbone_that_cannot_be_traced_is_left_alone(generator):
    class Wilful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.block = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12))

        def forward(self, images):
            first = self.norm(self.conv(images))
            return [first, self.block(first if images.sum() > 0 else -first)]

    model = disturb(Segmentor(Wilful(), small_head(generator)), generator).double().eval()
    folded, images = model.fold(), maps(generator, 1, 3, 8, 8)
    assert relative_error(folded(images).logits, model(images).logits) < 1e-10
    assert isinstance(folded.backbone.norm, nn.BatchNorm2d)
    assert isinstance(folded.backbone.block[1], nn.Identity)


def test_a_convolution_with_two_readers_keeps_its_norm(generator):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model = Twice().eval()
    fold_batch_norms(model)
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_the_original_is_left_alone(generator):
    model = build(generator)
    before = copy.deepcopy(model.state_dict())
    model.train()
    random_state = torch.get_rng_state()
    folded = model.fold()
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training and not folded.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in folded.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not hasattr(folded, "memory")


def test_training_is_refused(generator):
    folded = build(generator).fold()
    for train in (folded.train, folded.head.train):
        with pytest.raises(RuntimeError, match=r"a folded model is for inference"):
            train()
    assert not any(m.training for m in folded.modules())
    images = torch.randn(2, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 5, (2, 32, 32), generator=generator)
    assert folded.eval()(images, labels).losses.keys() == {"loss_cls", "loss_pr", "loss_aux"}
    folded.head.training = True
    with pytest.raises(RuntimeError, match=r"a folded model is for inference"):
        folded(images, labels)
    with pytest.raises(TypeError, match=r"fold: FCNHead has no memory"):
        models.create("fcn", 5, "test_resnet", feats_channels=16).fold()


@pytest.mark.parametrize("form", ["paper", "released"])
@torch.no_grad()
def test_copied_saved_and_loaded(form, generator):
    images = torch.randn(1, 3, 32, 40, generator=generator)
    folded = build(generator, form).fold()
    expected = folded(images, stages=2).logits
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    other = build(torch.Generator().manual_seed(1), form).fold()
    other.load_state_dict(folded.state_dict())
    twins = [copy.deepcopy(folded), torch.load(file, weights_only=False), other, folded.fold()]
    for twin in twins:
        assert torch.equal(twin(images, stages=2).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.thinned(only={"form": ["paper"]})  # test_compile.py folds both
@torch.no_grad()
def test_traced(form, generator):
    images = torch.randn(1, 3, 32, 40, generator=generator)
    folded = build(generator, form, stages=2).fold()
    expected = folded(images).logits
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")(images).logits
    torch.testing.assert_close(compiled, expected)
    exported = torch.export.export(folded, (images,)).module()(images).logits
    torch.testing.assert_close(exported, expected)


@pytest.mark.parametrize(
    "backbone", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "efficientnet_b0", "resnet18"]
)
def test_batch_norms_of_timms_blocks_are_folded(backbone, generator):
    """Also those with an activation, and where the whole backbone cannot be traced."""
    model = build(generator, backbone=backbone, output_stride=16).double()
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    folded = model.fold()
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.backbone.modules())
    torch.testing.assert_close(folded(images).logits, model.eval()(images).logits)
