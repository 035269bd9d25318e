"""Our models under transformers: Trainer, Auto classes, image processor, pipeline."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from mcibi_fast import models, ops
from mcibi_fast.data.base import normalise
from mcibi_fast.models import hub
from mcibi_fast.nn import GaussianMemory, RepresentationMemory

transformers = pytest.importorskip("transformers", reason="needs transformers")

K = 4


class Squares(Dataset):
    """Images of one colour per class; a frame of pixels is ignored."""

    def __init__(self, count: int = 12, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks = torch.randint(K, (count, 4, 4), generator=generator)
        self.labels = blocks.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
        noise = torch.randn(count, 3, size, size, generator=generator)
        self.images = self.labels[:, None] - 1.5 + 0.3 * noise
        self.labels[:, 0] = 255

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def make(name: str = "fcn_mcibipp", **options: Any) -> models.Segmentor:
    torch.manual_seed(0)
    options = {"feats_channels": 8, "dropout": 0.0} | options
    if "mcibi" in name:
        options.setdefault("transform_channels", 8)
    return models.create(name, K, "test_resnet", **options)


def arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return transformers.TrainingArguments(**(settings | changes))


def pixel_accuracy(prediction: Any) -> dict[str, float]:
    """What a user of SegFormer writes: logits at their stride, labels at full size."""
    logits, labels = (torch.from_numpy(each) for each in prediction)
    logits = torch.nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
    found, valid = logits.argmax(1), labels != 255
    return {"accuracy": float((found == labels)[valid].float().mean())}


def trained(folder: Path, model: models.Segmentor, callbacks: Any = None, **changes: Any) -> Any:
    trainer = transformers.Trainer(
        model,
        arguments(folder, **changes),
        callbacks=callbacks,
        train_dataset=Squares(),
        eval_dataset=Squares(6),
        compute_metrics=pixel_accuracy,
    )
    trainer.train()
    return trainer


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features and labels of every update of a Gaussian memory."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    update = GaussianMemory.update

    def recorded(self: Any, features: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append((features.clone(), labels.clone()))
        update(self, features, labels)

    monkeypatch.setattr(GaussianMemory, "update", recorded)
    return seen


@pytest.mark.parametrize("name", ["fcn", "isnet_mcibipp", "pspnet_mcibi"])
def test_called_by_keyword_the_result_is_as_in_transformers(name: str) -> None:
    model = make(name).eval()
    data = Squares(2)
    with torch.no_grad():
        plain = model(data.images, data.labels)
        named = model(pixel_values=data.images, labels=data.labels)
        without = model(pixel_values=data.images)
    logits, losses, _, _ = plain  # unpacks as before
    assert len(losses) >= 2  # with the auxiliary loss
    assert torch.equal(plain.loss, sum(losses.values())) and plain.loss.ndim == 0
    assert torch.equal(named.loss, plain.loss) and torch.equal(named.logits, logits)
    assert isinstance(named, dict) and list(named) == ["loss", "logits"]
    assert named["loss"] is named[0] is named.loss and named[1] is named.to_tuple()[1]
    assert list(without) == ["logits"] and without.loss is None and without[0] is without.logits
    assert plain._replace(losses={}).loss is None


def test_labels_of_another_size() -> None:
    """Logits are upsampled to the labels, as SegFormer's are."""
    model = make(auxiliary_weight=0.0, alpha=0.0).eval()
    small, large = Squares(2, 32), Squares(2, 64)
    with torch.no_grad():
        found = model(pixel_values=small.images, labels=large.labels)
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.interpolate(found.logits, (64, 64), mode="bilinear"),
        large.labels,
        ignore_index=255,
    )
    torch.testing.assert_close(found.loss, expected)
    with pytest.raises(ValueError, match="labels: expected"):
        model(small.images, large.labels)
    with pytest.raises(ValueError, match="labels: expected"):
        model(pixel_values=small.images, labels=large.labels[:1])
    with pytest.raises(ValueError, match="images: give them either"):
        model(labels=small.labels)
    with pytest.raises(ValueError, match="not both"):
        model(small.images, pixel_values=small.images)


@pytest.mark.slow
def test_trainer_evaluates(tmp_path: Path) -> None:
    model = make()
    trainer = trained(tmp_path, model, max_steps=1)
    metrics = trainer.evaluate()
    data, terms = Squares(6), []
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, 6)):
            terms.append(sum(model.eval()(data.images[part], data.labels[part]).losses.values()))
    assert metrics["eval_loss"] == pytest.approx(float(sum(terms)) / 2, rel=1e-6)
    prediction = trainer.predict(data)
    assert prediction.predictions.shape[:2] == (6, K)
    assert prediction.label_ids.shape == (6, 32, 32)
    with torch.no_grad():
        found = model.head.class_map(model(data.images).logits, (32, 32))
    valid = data.labels != 255
    expected = float((found == data.labels)[valid].float().mean())
    assert metrics["eval_accuracy"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "bf16": True},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
    ids=["plain", "accumulated", "bf16", "checkpointed"],
)
def test_the_memory_learns_once_per_step(
    tmp_path: Path, updates: list, changes: dict[str, Any]
) -> None:
    """Each update gets all images of the optimiser's step, and is that of the whole batch."""
    model = make()
    start = model.memory.memory.clone()
    trainer = trained(tmp_path, model, **changes)
    assert trainer.state.global_step == len(updates) == 2
    images = 2 * changes.get("gradient_accumulation_steps", 1)
    assert all(len(features) == len(labels) == images for features, labels in updates)
    expected = start
    for features, labels in updates:
        expected = ops.memory_update(expected, features, labels, unbiased=True)
    assert torch.equal(model.memory.memory, expected) and not torch.equal(start, expected)
    assert model.head._passes == []


@pytest.mark.slow
def test_a_loss_function_that_keeps_the_labels_is_not_silent(tmp_path: Path) -> None:
    def loss(output: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return ops.upsample_cross_entropy(output.logits, labels)

    trainer = transformers.Trainer(
        make(),
        arguments(tmp_path, max_steps=1),
        train_dataset=Squares(),
        compute_loss_func=loss,
    )
    with pytest.warns(UserWarning, match="labels: none in training mode, so the memory learns"):
        trainer.train()


@pytest.mark.slow
def test_the_schedule_of_momentum_and_memory_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the callback both follow the Trainer, warm-up included; without it it warns."""
    from mcibi_fast.compat.transformers.schedule import MemorySchedule

    model, found = make("fcn_mcibi"), []
    update = RepresentationMemory.update

    def recorded(self: Any, features: torch.Tensor, labels: torch.Tensor) -> None:
        found.append((self.momentum, model.head.memory_loss_due))
        update(self, features, labels)

    monkeypatch.setattr(RepresentationMemory, "update", recorded)
    changes = {"per_device_train_batch_size": 6, "max_steps": 4, "warmup_steps": 1}
    trained(tmp_path, model, callbacks=[MemorySchedule()], **changes)
    factors = [0, 1, 2 / 3, 1 / 3]
    assert [momentum for momentum, _ in found] == pytest.approx([0.9 * f for f in factors])
    assert [due for _, due in found] == [False, False, True, True]  # an epoch has two steps
    with pytest.warns(UserWarning, match="momentum_schedule: with 'poly' call model.schedule"):
        trained(tmp_path, make("fcn_mcibi"), **changes)
    with pytest.raises(TypeError, match="MemorySchedule: expected a model of mcibi_fast, got Lin"):
        MemorySchedule().on_step_begin(None, None, None, model=torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_passes_of_different_sizes_are_one_update(updates: list) -> None:
    from accelerate import Accelerator

    model, data = make(), [Squares(2, 32), Squares(2, 64)]
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    start = model.memory.memory.clone()
    model.train()
    maps = []
    for part in data:
        with accelerator.accumulate(model):
            model(part.images, part.labels).loss.backward()
        maps.append(len(updates))
    assert maps == [0, 1]
    sums = counts = 0
    for part in data:  # the same weights: no optimiser has stepped
        with torch.no_grad():
            R = model.pixel_representations(part.images)
        found = ops.class_feature_sums(R, part.labels, K)
        sums, counts = sums + found[0], counts + found[1]
    mean = sums / counts.clamp(min=1)[:, None]
    statistics = torch.stack([mean.mean(1), mean.std(1)], 1)
    expected = torch.where(counts[:, None] > 0, 0.9 * start + 0.1 * statistics, start)
    torch.testing.assert_close(model.memory.memory, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"form": "paper"}], ids=["released", "fresh noise"])
def test_trainer_resumes(tmp_path: Path, options: dict[str, str]) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, resumed = make(**options), make(**options)
    trained(tmp_path, whole, **saved)
    trainer = transformers.Trainer(resumed, arguments(tmp_path, **saved), train_dataset=Squares())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    others = resumed.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in whole.state_dict().items())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[models.Segmentor, Path]:
    """A model that predicts several classes, and its folder."""
    model = make(align_corners=True).eval()
    model.normalisation = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    folder = model.save_pretrained(tmp_path / "model", classes=["a", "b", "c", "d"])
    return model, folder


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((50, 38), Image.Resampling.NEAREST)


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    own, others = model.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[k], others[k]) for k in own)


def test_methods_save_and_load(saved: tuple[models.Segmentor, Path], tmp_path: Path) -> None:
    model, folder = saved
    assert {file.name for file in folder.iterdir()} == {
        hub.WEIGHTS, hub.CONFIG, hub.PREPROCESSOR, hub.CARD,
    }  # fmt: skip
    loaded = models.Segmentor.from_pretrained(folder)
    assert same(model, loaded) and not loaded.training
    assert loaded.spec is not None and loaded.spec.classes == ["a", "b", "c", "d"]
    assert loaded.spec.options == {
        "feats_channels": 8, "dropout": 0.0, "transform_channels": 8, "align_corners": True,
    }  # fmt: skip
    assert (loaded.spec.mean, loaded.spec.std) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    again = loaded.save_pretrained(tmp_path / "again")
    for name in (hub.WEIGHTS, hub.CONFIG, hub.PREPROCESSOR):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ValueError, match="classes: expected 4, one for each class, got 1"):
        loaded.save_pretrained(tmp_path / "no", classes=["a"])
    with pytest.raises(ValueError, match="folded models cannot be saved"):
        loaded.fold().save_pretrained(tmp_path / "no")
    odd = make(within_image=torch.nn.Conv2d(512, 8, 1))
    with pytest.raises(ValueError, match="options: within_image is a Conv2d, which no file"):
        odd.save_pretrained(tmp_path / "no")
    with pytest.raises(ValueError, match="neither loaded nor made by models"):
        models.Segmentor(model.backbone, model.head).save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_of_before_still_loads(saved: tuple[models.Segmentor, Path]) -> None:
    """Without what was added for transformers."""
    model, folder = saved
    (folder / hub.PREPROCESSOR).unlink()
    config = json.loads((folder / hub.CONFIG).read_text())
    for name in ("model_type", "architectures", "id2label", "label2id"):
        del config[name]
    (folder / hub.CONFIG).write_text(json.dumps(config))
    assert same(model, models.Segmentor.from_pretrained(folder))


@torch.no_grad()
def test_auto_classes(saved: tuple[models.Segmentor, Path], tmp_path: Path) -> None:
    import mcibi_fast.compat.transformers.auto  # noqa: F401

    model, folder = saved
    loaded = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert isinstance(loaded, models.Segmentor) and same(model, loaded) and not loaded.training
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    data = Squares(2)
    output = loaded(pixel_values=data.images, labels=data.labels)
    expected = model(data.images, data.labels)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert torch.equal(loaded(data.images).logits, expected.logits)
    torch.testing.assert_close(loaded.fold()(data.images).logits, expected.logits)

    renamed = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        folder, id2label={0: "w", 1: "x", 2: "y", 3: "z"}
    )
    again = renamed.save_pretrained(tmp_path / "again")
    assert models.Segmentor.from_pretrained(again).spec.classes == ["w", "x", "y", "z"]
    with pytest.raises(ValueError, match="num_labels: the saved model has 4 classes, not 7"):
        transformers.AutoModelForSemanticSegmentation.from_pretrained(folder, num_labels=7)
    fresh = transformers.AutoModelForSemanticSegmentation.from_config(loaded.config)
    assert fresh.state_dict().keys() == model.state_dict().keys() and not same(model, fresh)


@torch.no_grad()
def test_the_image_processor_is_ours(saved: tuple[models.Segmentor, Path]) -> None:
    import mcibi_fast.compat.transformers.auto  # noqa: F401

    model, folder = saved
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = np.array(picture())
    mask = np.full(pixels.shape[:2], 255, np.uint8)
    found = processor(images=picture(), segmentation_maps=mask, return_tensors="pt")
    image = normalise(torch.from_numpy(pixels).permute(2, 0, 1), *model.normalisation)
    assert torch.equal(found["pixel_values"][0], image)
    assert torch.equal(found["labels"][0], torch.full(pixels.shape[:2], 255))
    output = model(pixel_values=image[None])
    size = pixels.shape[:2]
    (labels,) = processor.post_process_semantic_segmentation(output, [size])
    assert torch.equal(labels, model.head.class_map(output.logits, size)[0])
    (both,) = processor.post_process_semantic_segmentation(output, [size], True)
    upsampled = model.head.upsample(output.logits, size)[0]
    torch.testing.assert_close(both.segmentation_scores, upsampled)
    (small,) = processor.post_process_semantic_segmentation(output)
    assert torch.equal(small, output.logits[0].argmax(0))
    with pytest.raises(ValueError, match="target_sizes: expected 1"):
        processor.post_process_semantic_segmentation(output, [size, size])


@torch.no_grad()
def test_pipeline(saved: tuple[models.Segmentor, Path], caplog: pytest.LogCaptureFixture) -> None:
    import mcibi_fast.compat.transformers.auto  # noqa: F401

    model, folder = saved
    segment = transformers.pipeline("image-segmentation", model=str(folder))
    parts = segment(picture())
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    labels = model.head.class_map(
        model(normalise(pixels, *model.normalisation)[None]).logits, pixels.shape[1:]
    )[0]
    present = labels.unique().tolist()
    assert [part["label"] for part in parts] == ["abcd"[k] for k in present]
    for part, k in zip(parts, present, strict=True):
        assert np.array_equal(np.array(part["mask"]) == 255, (labels == k).numpy())
    assert "not supported" not in caplog.text


def test_frozen_parts_stay_frozen() -> None:
    from mcibi_fast.compat.transformers.auto import MCIBIFastForSemanticSegmentation

    model = make().train()
    model.backbone.eval()
    made = MCIBIFastForSemanticSegmentation.of(model)
    made.fold()
    assert made.training and made.head.training and not made.backbone.training
    assert not MCIBIFastForSemanticSegmentation.of(model.eval()).training


@pytest.mark.slow
def test_trainer_saves_what_auto_loads(tmp_path: Path) -> None:
    """With the Auto class, a Trainer's checkpoint is a folder of a saved model."""
    from mcibi_fast.compat.transformers.auto import MCIBIFastForSemanticSegmentation

    model = MCIBIFastForSemanticSegmentation.of(make())
    trained(tmp_path, model, save_strategy="steps", save_steps=2)
    loaded = models.Segmentor.from_pretrained(tmp_path / "checkpoint-2")
    assert same(model, loaded)


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    arguments = "--backbone test_resnet --channels 8 --steps 2 --batch 2 --images 4 --size 32"
    run = subprocess.run(
        [sys.executable, "examples/hf_trainer.py", *arguments.split(), "--cpu", "--out", tmp_path],
        capture_output=True, text=True, cwd=root, timeout=550,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert re.search(r"^loss [\d.]+, mean IoU [\d.]+$", run.stdout, re.MULTILINE)
    assert "% of the picture" in run.stdout
    loaded = models.Segmentor.from_pretrained(tmp_path / "model")
    assert loaded.spec is not None and loaded.spec.classes[0] == "sky"


@pytest.mark.slow
def test_compiled_whole() -> None:
    """One graph, also under accumulation; the memory learns as without it."""
    from accelerate import Accelerator

    data, memories = Squares(4), []
    for compiled in (False, True):
        model = make()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        for half in (slice(0, 2), slice(2, 4)):
            with accelerator.accumulate(model):
                output = run(pixel_values=data.images[half], labels=data.labels[half])
                output.loss.backward()
        memories.append(model.memory.memory.clone())
        assert model.head._passes == []
    torch.testing.assert_close(*memories)
