"""`compat.transformers` on Hugging Face's models, image processors and Trainer."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn

from mcibi_fast.compat import transformers as library
from mcibi_fast.compat.upsampled import Upsampled, upsample
from tests.compat import dropin
from tests.compat.dropin import K

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 64,
    "patch_size": 16,
}
PYRAMID = {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8} | VIT
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Segformer": {
        "depths": [1] * 4,
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 16,
    },
    "UperNet": {
        "hidden_size": 16,
        "auxiliary_channels": 8,
        "auxiliary_in_channels": 16,
        "pool_scales": [1, 2],
    },
    "DPT": {
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8] * 4,
        "fusion_hidden_size": 8,
        "is_hybrid": False,
    }
    | VIT,
    "Beit": PYRAMID,
    "Data2VecVision": PYRAMID,
    "MobileViT": {
        "image_size": 64,
        "hidden_sizes": [16] * 3,
        "neck_hidden_sizes": [8] * 6 + [16],
        "num_attention_heads": 2,
        "aspp_out_channels": 8,
    },
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.25, "aspp_out_channels": 8},
    "MobileNetV2": {"image_size": 64, "depth_multiplier": 0.25},
}


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def build(kind: str, classes: int = K, **options: Any) -> Any:
    torch.manual_seed(0)
    options = CONFIGURATIONS[kind] | {"num_labels": classes} | options
    if kind == "UperNet":
        options["backbone_config"] = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
    if kind in ("Segformer", "Beit", "Data2VecVision"):
        options["drop_path_rate"] = 0.0
    configuration = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForSemanticSegmentation")(configuration)
    return dropin.without_dropout(model)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("Segformer", "UperNet")))
        for kind in CONFIGURATIONS
    ],
)
def test_agrees(kind: str, generator: torch.Generator) -> None:
    """The loss with its ignored label and the auxiliary head's weight, as Hugging Face has them."""
    model = build(kind).double()
    inputs = {"pixel_values": dropin.images(generator), "labels": dropin.labels(generator)}

    def loss_of(model: nn.Module) -> Tensor:
        return model(**inputs).loss

    fast = library.accelerate(copy.deepcopy(model))
    for each in (model, fast):
        each.train()
    dropin.assert_close(dropin.step(fast, loss_of), dropin.step(model, loss_of), 1e-9)
    assert dropin.forms_upsampled_logits(lambda: dropin.step(model, loss_of))
    assert not dropin.forms_upsampled_logits(lambda: dropin.step(fast, loss_of))
    for each in (model, fast):
        each.eval()
    with torch.no_grad():
        classes = [m(inputs["pixel_values"]).logits.argmax(1) for m in (fast, model)]
        assert torch.equal(*classes)
        got, expected = (m(**inputs, return_dict=False) for m in (fast, model))
        dropin.assert_close([x + 0 for x in got[:2]], expected[:2])
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)


def test_everything_that_holds_for_every_model(generator: torch.Generator) -> None:
    inputs = {"pixel_values": dropin.images(generator), "labels": dropin.labels(generator)}
    fast = dropin.check_accelerate(
        library,
        build("UperNet").double(),
        lambda model: model(**inputs).loss,
        lambda model: model(**inputs).logits.argmax(1),
    )
    with torch.no_grad():
        assert type(fast(**inputs).logits) is Upsampled


def test_more_than_255_classes_keep_the_ignored_label(generator: torch.Generator) -> None:
    """255 is ignored in Hugging Face's loss although it could be a class."""
    model = build("Segformer", classes=300).double().eval()
    fast = library.accelerate(copy.deepcopy(model))
    inputs = {"pixel_values": dropin.images(generator), "labels": dropin.labels(generator)}
    results = [dropin.step(m, lambda m: m(**inputs).loss) for m in (fast, model)]
    dropin.assert_close(*results)


PROCESSORS = ["Segformer", "Beit", "DPT", "MobileViT", "MaskFormer", "Mask2Former"]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_image_processors(kind: str, generator: torch.Generator) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    outputs = SimpleNamespace(
        logits=torch.randn(2, K, 16, 16, generator=generator),
        class_queries_logits=torch.randn(2, 7, K + 1, generator=generator),
        masks_queries_logits=torch.randn(2, 7, 16, 16, generator=generator),
    )
    sizes = [dropin.SIZE, (80, 48)] if "Mask" not in kind else [(400, 500), dropin.SIZE]
    fast = library.accelerate(copy.deepcopy(processor))

    def run(each: Any) -> Any:
        return each.post_process_semantic_segmentation(outputs, target_sizes=sizes)

    for got, expected in zip(run(fast), run(processor), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    with dropin.Formed(1, K, *sizes[0]) as formed:
        run(fast)
    assert not formed.found
    assert type(pickle.loads(pickle.dumps(fast))) is type(fast)
    assert type(library.restore(fast)) is type(processor)


@pytest.mark.parametrize(
    "kind", ["Segformer", "Beit", "DPT", "MobileViT", "MobileNetV2", "Tipsv2Dpt"]
)
def test_logits_that_the_model_upsampled(kind: str, generator: torch.Generator) -> None:
    """UperNet's: an image of their size needs none of them; another size resizes them again."""
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    fast = library.accelerate(copy.deepcopy(processor))
    low = torch.randn(2, K, 16, 16, generator=generator)
    plain = F.interpolate(low, dropin.SIZE, mode="bilinear")

    def run(each: Any, logits: Tensor, sizes: Any, scores: bool = False) -> Any:
        outputs = SimpleNamespace(logits=logits)
        return each.post_process_semantic_segmentation(outputs, sizes, scores)

    other = (80, 96)
    for sizes in (None, [dropin.SIZE] * 2, [other, other]):
        found = run(fast, upsample(low, dropin.SIZE, False), sizes)
        for got, expected in zip(found, run(processor, plain, sizes), strict=True):
            assert torch.equal(got, expected)
        with dropin.Formed(2, K, *(other if sizes and other in sizes else dropin.SIZE)) as formed:
            for each in run(fast, upsample(low, dropin.SIZE, False), sizes, True):
                assert each.segmentation.shape == each.segmentation_scores.shape[1:]
        assert not formed.found


def test_upernet_to_its_labels(generator: torch.Generator) -> None:
    model, processor = build("UperNet").double().eval(), transformers.SegformerImageProcessor()
    fast, post = library.accelerate(copy.deepcopy(model)), library.accelerate(processor)
    x = dropin.images(generator)

    @torch.no_grad()
    def run(each: Any) -> Any:
        found = post.post_process_semantic_segmentation(each(pixel_values=x), [dropin.SIZE] * 2)
        return torch.stack(found)

    assert torch.equal(run(fast), run(model))
    assert not dropin.forms_upsampled_logits(lambda: run(fast))
    assert "(logits that the model has upsampled to another size" in str(library.explain(post))


def test_processors_in_which_nothing_can_wait() -> None:
    for kind, reason in {"OneFormer": "antialiased", "SegGpt": "nearest pixel"}.items():
        with pytest.raises(ValueError, match=reason):
            library.accelerate(getattr(transformers, f"{kind}ImageProcessor")())


def test_what_is_left_alone() -> None:
    torch.manual_seed(0)
    masks = transformers.MaskFormerForInstanceSegmentation.__new__(
        transformers.MaskFormerForInstanceSegmentation
    )
    nn.Module.__init__(masks)
    with pytest.raises(ValueError, match="its losses are of masks; pass its image processor"):
        library.accelerate(masks)
    with pytest.raises(ValueError, match="one class"):
        library.accelerate(build("Segformer", classes=1))
    with pytest.raises(ValueError, match=r"nothing in ResNetModel .*ForSemanticSegmentation"):
        library.accelerate(transformers.ResNetModel(transformers.ResNetConfig(depths=[1] * 4)))


def test_pipeline() -> None:
    """Its model and its image processor at once."""
    options = {
        "model": build("Segformer"),
        "image_processor": transformers.SegformerImageProcessor(),
    }
    pipelines = [
        transformers.pipeline("image-segmentation", **copy.deepcopy(options)) for _ in "ab"
    ]
    assert library.accelerate(pipelines[0]) is pipelines[0]
    assert [place.name for place in library.explain(pipelines[0]).replaced] == [
        "image_processor",
        "",
    ]
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    got, expected = (each(picture) for each in pipelines)
    assert [x["label"] for x in got] == [x["label"] for x in expected]
    assert all(
        a["mask"].tobytes() == b["mask"].tobytes() for a, b in zip(got, expected, strict=True)
    )


class Scenes(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, *dropin.SIZE, generator=generator),
            "labels": torch.randint(0, K, dropin.SIZE, generator=generator),
            "unused": torch.zeros(1),  # which Trainer removes by the signature of forward
        }


@pytest.mark.parametrize("mixed", [False, True])
def test_trainer(mixed: bool, tmp_path: Path) -> None:
    """Two accumulated batches per step; evaluation; saving under the library's class name."""
    losses, scores = [], []
    for kind in (lambda m: m, library.accelerate):
        model = kind(build("UperNet"))
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            optim="sgd",  # Adam's first steps are the gradient's sign, which rounding may turn
            learning_rate=0.01,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            bf16=mixed,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=Scenes(),
            eval_dataset=Scenes(),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
            compute_metrics=lambda found: {"share": float((found.predictions == 0).mean())},
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        evaluated = trainer.evaluate()
        scores.append([evaluated["eval_loss"], evaluated["eval_share"]])
        model.save_pretrained(tmp_path / "saved")
        again = type(build("UperNet")).from_pretrained(tmp_path / "saved")
        assert again.config.architectures == ["UperNetForSemanticSegmentation"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if mixed else 1e-6)
    # In bfloat16 upsampled logits tie, which `accelerate` computes in float32: 1 % of the pixels.
    assert scores[1] == pytest.approx(scores[0], rel=1e-5, abs=1e-2 if mixed else 0)


@pytest.mark.slow
def test_compiled(generator: torch.Generator) -> None:
    model = build("Segformer")
    fast = torch.compile(library.accelerate(copy.deepcopy(model)), backend="aot_eager")
    x, y = dropin.images(generator, torch.float32), dropin.labels(generator)
    results = [dropin.step(m, lambda m: m(pixel_values=x, labels=y).loss) for m in (fast, model)]
    dropin.assert_close(*results, 1e-4)


@pytest.mark.slow
def test_parts_compiled_before(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled backbone traces as it is, and what follows waits."""
    model = build("Segformer").eval()
    fast = library.accelerate(copy.deepcopy(model))
    inputs = {"pixel_values": dropin.images(generator, torch.float32)}
    inputs["labels"] = dropin.labels(generator)
    fast(**inputs)  # transformers' first call breaks the graph, by a lock
    fast.segformer.compile(backend="eager", fullgraph=True)
    monkeypatch.setattr(Upsampled, "_compute", None)
    results = [dropin.step(m, lambda m: m(**inputs).loss) for m in (fast, model)]
    dropin.assert_close(*results, 1e-4)
