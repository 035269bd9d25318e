"""The memory in Hugging Face's models, by the real library."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat.dataset_context import context_of
from tests.compat.memory_in_decoders import (
    SMALL,
    K,
    check_accelerated,
    check_evaluation,
    check_loss,
    check_reload,
    check_training,
    scenes,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")
adapter = pytest.importorskip("mcibi_fast.compat.transformers")


def segformer() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=K,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        drop_path_rate=0.0,
        semantic_loss_ignore_index=255,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def upernet() -> nn.Module:
    backbone = transformers.ConvNextConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        num_labels=K,
        use_auxiliary_head=True,
        auxiliary_in_channels=16,
        auxiliary_channels=8,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def beit(name: str = "Beit") -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        image_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        out_indices=[1, 2, 3, 4],
        use_auxiliary_head=False,
        num_labels=K,
        semantic_loss_ignore_index=255,
    )
    return getattr(transformers, f"{name}ForSemanticSegmentation")(config)


def dpt() -> nn.Module:
    config = transformers.DPTConfig(
        image_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        num_labels=K,
    )
    return transformers.DPTForSemanticSegmentation(config)


def mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(image_size=64, num_labels=K, aspp_out_channels=16)
    return transformers.MobileViTForSemanticSegmentation(config)


OTHERS = {
    "upernet": upernet,
    "beit": beit,
    "data2vec": lambda: beit("Data2VecVision"),
    "dpt": dpt,
    "mobilevit": mobilevit,
}


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(pixel_values=images, labels=labels).loss


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits


@pytest.mark.slow
def test_segformer_learns_and_reloads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter.with_mcibi(segformer(), **SMALL)
    assert isinstance(model, transformers.SegformerForSemanticSegmentation)
    check_training(model, loss_of, monkeypatch)
    check_evaluation(model, logits_of)
    model.save_pretrained(tmp_path)
    other = adapter.from_pretrained(tmp_path)
    assert not other.training and other.config.mcibi == SMALL
    check_reload(model, other, logits_of)
    check_reload(model, type(model).from_pretrained(tmp_path), logits_of)
    check_reload(model, copy.deepcopy(model), logits_of)
    other.train()  # and it trains on, as one that was just made
    memory = context_of(other).context.memory
    before = memory.memory.clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    loss_of(other, *scenes()).backward()
    optimizer.step()
    assert not torch.equal(memory.memory, before)


@pytest.mark.parametrize("make", [segformer, upernet], ids=["segformer", "upernet"])
def test_with_accelerate_in_both_orders(make: Callable[[], nn.Module]) -> None:
    """UperNet returns upsampled logits, and has an auxiliary head."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make()

    check_accelerated(adapter, build, loss_of, logits_of, pickles=make is segformer)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_loss_of_W_is_added_in_every_architecture(name: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]()
    base = type(model)
    keys = set(model.state_dict())
    model = adapter.with_mcibi(model, **SMALL)
    assert len(keys - set(model.state_dict())) == 2  # weight and bias have another name
    check_loss(model, loss_of, lambda m, x, y: base.forward(m, pixel_values=x, labels=y).loss)


def test_the_loss_is_that_of_segformer_and_W_in_both_modes() -> None:
    model = adapter.with_mcibi(segformer(), **SMALL)
    base = transformers.SegformerForSemanticSegmentation
    check_loss(model, loss_of, lambda m, *batch: base.forward(m, *batch).loss)
    images, labels = scenes()
    model.eval()
    with torch.no_grad():
        both = model(images, labels)  # by position
        loss, logits = model(images, labels=labels, return_dict=False)[:2]
        plain = base.forward(model, images, labels)
    assert torch.equal(both.loss, loss) and torch.equal(both.logits, logits)
    assert torch.equal(plain.logits, logits) and float(loss) > float(plain.loss)


def test_a_loss_of_ones_own() -> None:
    model = adapter.with_mcibi(segformer(), **SMALL).train()
    images, labels = scenes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = context_of(model).context.memory
    before = memory.memory.clone()
    (logits_of(model, images).mean() + model.mcibi_loss(labels)).backward()
    optimizer.step()
    assert not torch.equal(memory.memory, before)
    with pytest.raises(RuntimeError, match="mcibi_loss: call the model in training mode first"):
        model.mcibi_loss(labels)
    logits_of(model, images)
    with pytest.warns(UserWarning, match=r"add model.mcibi_loss\(labels\) to the loss"):
        logits_of(model, images)
    assert copy.deepcopy(model).mcibi_loss.__self__ is not model.mcibi_loss.__self__


@pytest.mark.slow
def test_the_librarys_trainer(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its linear decay of the learning rate, which the momentum follows."""
    model = adapter.with_mcibi(segformer(), momentum_schedule="poly", **SMALL)
    images, labels = scenes()
    data = [{"pixel_values": i, "labels": l} for i, l in zip(images, labels, strict=True)]
    memory = context_of(model).context.memory
    updates = []
    learn = type(memory)._learn

    def recorded(self, statistics, forwards):
        updates.append((int(forwards), self.momentum))
        learn(self, statistics, forwards)

    monkeypatch.setattr(type(memory), "_learn", recorded)
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert updates == [(1, pytest.approx(0.1 * factor)) for factor in (1, 2 / 3, 1 / 3)]
    assert trainer.evaluate()["eval_loss"] > 0


def test_wrong_models_are_named() -> None:
    with pytest.raises(ValueError, match="with_mcibi: Linear is not known; of transformers"):
        adapter.with_mcibi(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"with_mcibi: expected a torch.nn.Module, got int"):
        adapter.with_mcibi(1)
    model = adapter.with_mcibi(segformer(), **SMALL)
    with pytest.raises(ValueError, match="has a context already"):
        adapter.with_mcibi(model)
    with pytest.raises(ValueError, match=r"stages: expected at least 1, got 0"):
        adapter.with_mcibi(segformer(), stages=0)
    with pytest.raises(ValueError, match="was not given to with_mcibi"):
        context_of(segformer())
