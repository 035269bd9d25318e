"""Video-MCIBI++ and Video-MCIBI: Eqs. 18 and 19, training on clips, starting from image models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.models import VideoSegmentor, load_image_weights
from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from tests.models.disturbed import disturb

K, Z, B, SIZE = 5, 8, 2, (32, 48)
OPTIONS = {"feats_channels": Z, "transform_channels": 8, "output_stride": 8}
FAMILIES = ["upernet_video_mcibipp", "upernet_video_mcibi", "fcn_video_mcibipp", "fcn_video_mcibi"]


def lively(model, generator):
    """Statistics, memory and weights W that differ from their initial values; evaluation mode."""
    disturb(model, generator)
    with torch.no_grad():
        for decoder in (model.head.context.weight_head, model.head.within_image_head):
            if decoder is not None:
                decoder.classifier.weight.mul_(20)  # weights W that differ between frames
    return model.eval()


def small(generator, name="upernet_video_mcibipp", **options) -> VideoSegmentor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(name, K, "test_resnet", **{**OPTIONS, **options})
    return lively(model, generator).double()


def clips(generator, history=2):
    return torch.randn(B, history + 1, 3, *SIZE, generator=generator, dtype=torch.float64)


def labels(generator):
    return torch.randint(0, K, (B, *SIZE), generator=generator)


def as_printed(model, images):
    """O by Eqs. 18 and 19, frame by frame: every frame's R, W and C_bi for themselves."""
    head, context = model.head, model.head.context
    R, C_bi = [], []
    for frame in images.unbind(1):
        features = model.backbone(frame)
        R.append(head.bottleneck(features[-1]))
        W = context.weight_head(R[-1])
        if head.weights_from == "cwi":
            W = head.within_image_head(head.within_image(features[-1]))
        C_bi.append(context.attention(R[-1], context.memory.aggregate(W)))
    past = C_bi[:-1] if head.past == "context" else R[:-1]
    R_aug = context.fuse.conv(torch.cat([R[-1], *past, C_bi[-1]], dim=1))
    within = head.within_image_context(features, R[-1], W)
    return head.classify(R_aug, head.prepare_classifier(features, within))


@pytest.mark.parametrize("past", ["context", "features"])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_equations(name, form, past, generator):
    model = small(generator, name, form=form, past=past)
    images = clips(generator)
    logits = model(images).logits
    assert logits.shape[:2] == (B, K)
    torch.testing.assert_close(logits, as_printed(model, images), rtol=1e-10, atol=1e-12)
    swapped = model(images[:, [1, 0, 2]]).logits
    assert not torch.allclose(swapped, logits, rtol=0, atol=1e-6), (
        "the order of past frames must matter"
    )


def test_a_swin_backbone(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(
            "upernet_video_mcibipp", K, "swin_tiny_patch4_window7_224", feats_channels=Z,
            transform_channels=8, output_stride=32,
        ).eval()  # fmt: skip
    images = torch.randn(1, 3, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images).logits, as_printed(model, images), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_only_the_fusing_convolution_grows_with_the_history(generator):
    shapes = {
        h: {k: v.shape for k, v in small(generator, history=h).state_dict().items()} for h in (1, 3)
    }
    assert shapes[1].keys() == shapes[3].keys()
    differing = [name for name in shapes[1] if shapes[1][name] != shapes[3][name]]
    assert differing == ["head.context.fuse.conv.0.weight"]
    assert shapes[3][differing[0]] == (Z, (2 + 3) * Z, 3, 3)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(generator):
    model, images = small(generator), clips(generator)
    still = images[:, -1:].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(model(images[:, -1]).logits, model(still).logits)


@torch.no_grad()
def test_further_stages_keep_the_past_of_the_first(generator):
    model, images = small(generator, form="paper"), clips(generator)
    first = model(images, stages=1)
    head = model.head
    W = head.next_weights(first.weight_logits, first.logits)  # Eq. 17
    features = [m[-B:] for m in model.backbone(images.transpose(0, 1).flatten(0, 1))]
    R = [head.bottleneck(model.backbone(frame)[-1]) for frame in images.unbind(1)]
    past = [head.context.aggregate(r, head.context.weight_head(r)) for r in R[:-1]]
    R_aug = head.context.fuse.conv(torch.cat([R[-1], *past, head.context.aggregate(R[-1], W)], 1))
    within = head.within_image_context(features, R[-1], W)
    second = head.classify(R_aug, head.prepare_classifier(features, within))
    torch.testing.assert_close(model(images, stages=2).logits, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("past", ["context", "features"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step(name, past, generator):
    model = small(generator, name, past=past, dropout=0.0).train()
    images, target = clips(generator).requires_grad_(), labels(generator)
    before = model.memory.memory.clone()
    output = model(images, target)
    assert {"loss_cls", "loss_pr", "loss_aux"} <= output.losses.keys()
    sum(output.losses.values()).backward()
    assert (images.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all(), "a frame without a gradient"
    assert not torch.equal(model.memory.memory, before)


def test_the_memory_takes_the_labelled_frame_alone(generator):
    model = small(generator, dropout=0.0).train()
    kept = []
    model.memory.update = lambda R, target: kept.append((R, target))
    images, target = clips(generator), labels(generator)
    model(images, target)
    ((R, given),) = kept
    assert given is target and not R.requires_grad
    features = model.backbone(images.transpose(0, 1).flatten(0, 1))
    torch.testing.assert_close(R, model.head.bottleneck(features[-1])[-B:])


def test_frames_share_one_attention(generator, monkeypatch):
    from mcibi_fast import ops

    for past, frames in (("context", 3), ("features", 1)):
        model, batches = small(generator, past=past, projections="released"), []
        original = ops.confidence_attention

        def watched(query, *args, original=original, batches=batches, **options):
            batches.append(len(query))
            return original(query, *args, **options)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(ops, "confidence_attention", watched)
            model(clips(generator))
        assert batches == [frames * B]


VARIANTS = {
    "paper": {"form": "paper"},
    "released": {},
    "features": {"form": "paper", "past": "features"},
    "hard": {"form": "paper", "hard": True},
    "hard_released": {"hard": True},
    "downsample": {"downsample": True},
    "extra_attention": {"extra_attention": True},
    "after": {"memory_joins": "after", "form": "paper"},
    "narrow": {"form": "paper", "feats_channels": 4, "transform_channels": 8},  # K > Z
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_folded(variant, generator):
    model, images = small(generator, **VARIANTS[variant]), clips(generator)
    folded = model.fold()
    assert isinstance(folded, VideoSegmentor)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.head.modules())
    for stages in (1, 2):
        expected = model(images, stages=stages).logits
        got = folded(images, stages=stages).logits
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        folded.train()


@torch.no_grad()
def test_folding_turns_past_contexts_into_class_weights(generator):
    folded = small(generator, form="paper").fold()
    assert folded.head.context.fuse.conv.weight.shape == (Z, Z + 2 * K, 3, 3)


def spec(name, **options) -> ModelSpec:
    return ModelSpec(
        name=name, backbone="test_resnet", options={**OPTIONS, **options},
        classes=[f"c{k}" for k in range(K)], palette=[[k, k, k] for k in range(K)],
        mean=[0.5] * 3, std=[0.2] * 3,
    )  # fmt: skip


@pytest.fixture
def image_checkpoint(generator, tmp_path):
    """An image model, and a file of its weights."""
    image = small(generator, "upernet_mcibipp", form="paper")
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack_weights(image.float(), spec("upernet_mcibipp", form="paper")))
    return image, file


@torch.no_grad()
def test_starts_equal_to_an_image_model(image_checkpoint, generator):
    image, file = image_checkpoint
    model = small(generator, form="paper", history=3).float()
    images = clips(generator, history=3).float()
    load_image_weights(model, file)
    expected = image(images[:, -1], stages=2).logits
    torch.testing.assert_close(model(images, stages=2).logits, expected)
    assert model.head.context.fuse.conv[0].weight[:, Z:-Z].count_nonzero() == 0


@torch.no_grad()
def test_pretrained_takes_an_image_models_checkpoint(image_checkpoint, generator, tmp_path):
    image, file = image_checkpoint
    described = spec("upernet_video_mcibipp", form="paper", pretrained=str(file))
    model = create_model(described).eval()
    images = clips(generator).float()
    expected = image(images[:, -1]).logits
    torch.testing.assert_close(model(images).logits, expected)
    # What is saved then stands for itself.
    own = tmp_path / "video.safetensors"
    own.write_bytes(pack_weights(model, described))
    file.unlink()
    again, _ = load_model(own)
    torch.testing.assert_close(again(images).logits, expected)
    load_image_weights(model, own)


def test_other_classes_keep_what_does_not_depend_on_them(image_checkpoint, generator, tmp_path):
    """As for image models: the classifiers and the memory are fresh, and the message names them."""
    image, file = image_checkpoint
    other = models.create("upernet_video_mcibipp", K + 2, "test_resnet",
                          **{**OPTIONS, "form": "paper", "pretrained": file})  # fmt: skip
    fresh = set(other.beginning.fresh)
    classifiers = {n for n, m in other.named_modules() if getattr(m, "out_channels", 0) == K + 2}
    assert len(classifiers) == 4 and fresh == classifiers | {"head.context.memory"}
    expected = {n: v for n, v in image.state_dict().items() if n.rpartition(".")[0] not in fresh}
    fusing = "head.context.fuse.conv.0.weight"
    new, old = expected[fusing].chunk(2, 1)
    expected[fusing] = torch.cat([new, torch.zeros_like(new), torch.zeros_like(new), old], 1)
    for name, value in expected.items():
        torch.testing.assert_close(other.state_dict()[name], value)
    again = models.create("upernet_video_mcibipp", K, "test_resnet", **OPTIONS, form="paper")
    assert not load_image_weights(again, file).fresh


def test_another_history_is_refused(generator, tmp_path):
    """Past frames' weights of one history do not become another's."""
    model = small(generator, history=1).float()
    file = tmp_path / "h1.safetensors"
    file.write_bytes(pack_weights(model, spec("upernet_video_mcibipp", history=1)))
    load_image_weights(small(generator, history=1).float(), file)
    for history in (2, 3):
        with pytest.raises(ValueError, match="another architecture"):
            load_image_weights(small(generator, history=history).float(), file)


def test_another_architecture_is_named(image_checkpoint, generator, tmp_path):
    _, file = image_checkpoint
    with pytest.raises(ValueError, match="another architecture"):
        load_image_weights(small(generator, "fcn_video_mcibipp"), file)
    with pytest.raises(ValueError, match="not a checkpoint"):
        other = tmp_path / "other.safetensors"
        other.write_bytes(b"no")
        load_image_weights(small(generator), other)
    missing = dataclasses.replace(spec("upernet_video_mcibipp", pretrained=str(tmp_path / "none")))
    with pytest.raises(RuntimeError, match="there is no file"):
        create_model(missing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 0}, "history: expected at least 1"),
        ({"past": "both"}, "past: expected 'context' or 'features'"),
        ({"weights_from": "labels"}, "weights_from: 'labels'"),
        ({"fusion": "add"}, "fusion: past frames need 'concatenation'"),
    ],
)
def test_wrong_options(options, message, generator):
    with pytest.raises(ValueError, match=message):
        small(generator, **options)


def test_training_wants_clips(generator):
    images, labels = torch.randn(B, 3, *SIZE), torch.zeros(B, *SIZE, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"trained on clips.*data\.history=2 gives clips"):
        small(generator).float().train()(images, labels)


def test_wrong_inputs(generator):
    model, images = small(generator), clips(generator)
    with pytest.raises(ValueError, match=r"clips \(B, 3, 3, H, W\) for history=2"):
        model(images[:, 1:])
    with pytest.raises(ValueError, match="labels: expected"):
        model(images, labels(generator)[:1])
    with pytest.raises(ValueError, match="past: 1 maps of past frames, expected 2"):
        features = model.head.bottleneck(model.backbone(images[:, 0])[-1])
        model.head.context.fuse.prepare(features, [features])
