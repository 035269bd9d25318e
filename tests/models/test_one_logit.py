"""Binary segmentation with one logit: K = 1 from data to metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.classification as reference
from PIL import Image

from mcibi_fast import cli, models
from mcibi_fast.data.folder import class_list
from mcibi_fast.inference import export
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.nn import PixelLoss
from mcibi_fast.recipes import InferenceConfig
from mcibi_fast.training.run import Run
from tests.learning import share_left

SMALL = {"backbone": "test_resnet", "feats_channels": 8, "dropout": 0.0}
PLAIN = ("fcn", "pspnet", "deeplabv3", "deeplabv3plus", "upernet", "danet", "semanticfpn")


def made(framework: str = "fcn", memory: str | None = None, **options) -> models.Segmentor:
    torch.manual_seed(0)
    if memory:
        options["transform_channels"] = 8
    return models.create(framework, 1, memory=memory, **SMALL, **options)


def images(count: int = 2, size: tuple[int, int] = (40, 48)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def labels(count: int = 2, size: tuple[int, int] = (40, 48)) -> torch.Tensor:
    found = torch.randint(2, (count, *size), generator=torch.Generator().manual_seed(2))
    found[:, :5] = 255
    return found


def bce(logits: torch.Tensor, label: torch.Tensor, **options) -> torch.Tensor:
    full = F.interpolate(logits, label.shape[1:], mode="bilinear")[:, 0].double()
    losses = F.binary_cross_entropy_with_logits(
        full, label.clamp(0, 1).double(), reduction="none", **options
    )
    return losses[label != 255].mean()


@pytest.mark.parametrize("framework", PLAIN)
def test_one_logit_and_binary_cross_entropy(framework: str) -> None:
    model = made(framework)
    output = model(images(), labels())
    assert output.logits.shape[1] == 1
    expected = bce(output.logits, labels())
    torch.testing.assert_close(output.losses["loss_cls"].double(), expected, rtol=1e-5, atol=1e-6)
    sum(output.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_gradient_is_that_of_binary_cross_entropy() -> None:
    logits = torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    label = labels(size=(20, 24))
    (own,) = torch.autograd.grad(PixelLoss()(logits, label), logits)
    (expected,) = torch.autograd.grad(bce(logits, label), logits)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
    weighted = PixelLoss(class_weights=[1.0, 3.0])(logits, label)
    full = F.interpolate(logits, (20, 24), mode="bilinear")[:, 0]
    losses = F.binary_cross_entropy_with_logits(
        full, label.clamp(0, 1).double(), reduction="none", pos_weight=torch.tensor(3.0).double()
    )
    valid = label != 255
    total = losses[valid].sum() / torch.where(label == 1, 3.0, 1.0)[valid].sum()
    torch.testing.assert_close(weighted, total)


@pytest.mark.parametrize("memory", ["mcibi", "mcibipp"])
@pytest.mark.parametrize("framework", ["fcn", "deeplabv3"])
def test_with_a_memory(framework: str, memory: str) -> None:
    """W and the memory have both classes, the prediction one logit."""
    model = made(framework, memory)
    before = model.memory.memory.clone() if memory == "mcibipp" else None
    output = model.train()(images(), labels())
    assert output.logits.shape[1] == 1 and model.memory.num_classes == 2
    torch.testing.assert_close(
        output.losses["loss_cls"].double(), bce(output.logits, labels()), rtol=1e-5, atol=1e-6
    )
    if before is not None:
        assert (model.memory.memory != before).any(1).all()  # of background and foreground
    model.eval()
    one, two = (model(images(), stages=n).logits for n in (1, 2))
    assert one.shape == two.shape and not torch.equal(one, two)
    if framework == "fcn":
        torch.testing.assert_close(model.fold()(images()).logits, one, rtol=1e-3, atol=1e-4)


def test_one_logit_by_option_and_what_refuses_it() -> None:
    model = models.create("fcn", 2, one_logit=True, **SMALL)
    assert model(images()).logits.shape[1] == 1
    with pytest.raises(ValueError, match="one_logit: tells 2 classes apart, but there are 3"):
        models.create("fcn", 3, one_logit=True, **SMALL)
    for framework in ("encnet", "ocrnet", "isnet", "pointrend", "maskformer", "ce2p"):
        with pytest.raises(ValueError, match=f"one_logit: {framework} uses its classes"):
            models.create(framework, 1, backbone="test_resnet")


@torch.no_grad()
def centred(model: models.Segmentor) -> models.Segmentor:
    """The model with logits of both signs, so that any threshold selects something."""
    z = model(images()).logits
    classifier = model.head.decoder.classifier
    scale = 2 / z.std(dim=(0, 2, 3)).mean()
    classifier.weight.mul_(scale)
    classifier.bias.copy_(scale * (classifier.bias - z.mean(dim=(0, 2, 3))))
    return model


SETTINGS = [
    {},
    {"flip": True},
    {"scales": (0.75, 1.0), "flip": True},
    {"window": (24, 24), "stride": (16, 16)},
    {"softmax": "none", "scales": (0.75, 1.0)},
    {"softmax": "stride", "flip": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_thresholds(settings: dict) -> None:
    """A threshold of 0.5 changes nothing; others select by the mean probability."""
    model = centred(made().eval())
    size = (40, 48)
    maps = {
        t: predict_labels(model, images(), size, InferenceConfig(**settings, threshold=t))
        for t in (None, 0.2, 0.5, 0.8)
    }
    assert torch.equal(maps[None], maps[0.5])
    counts = [int(maps[t].sum()) for t in (0.2, 0.5, 0.8)]
    assert counts[0] > counts[1] > counts[2] > 0
    if settings in ({}, {"flip": True}):
        views = [model(images()).logits]
        if settings:
            views.append(model(images().flip(-1)).logits.flip(-1))
        full = [F.interpolate(v, size, mode="bilinear")[:, 0].sigmoid() for v in views]
        mean = torch.stack(full).mean(0)
        for t in (0.2, 0.5, 0.8):
            differs = maps[t] != (mean > t)
            assert not differs.any() or (mean[differs] - t).abs().max() < 1e-6


def test_thresholds_of_two_logits_and_errors() -> None:
    model = centred(models.create("fcn", 2, **SMALL).eval())
    full = F.interpolate(model(images()).logits, (40, 48), mode="bilinear").softmax(1)[:, 1]
    found = predict_labels(model, images(), (40, 48), InferenceConfig(threshold=0.4))
    assert ((full > 0.4) == found).float().mean() > 0.9999 and found.any() and not found.all()
    three = models.create("fcn", 3, **SMALL).eval()
    with pytest.raises(ValueError, match="threshold: for two classes, but the model has 3"):
        predict_labels(three, images(), (40, 48), InferenceConfig(threshold=0.4))
    with pytest.raises(ValueError, match="threshold: expected between 0 and 1, got 1"):
        InferenceConfig(threshold=1.0).validate()


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_torchmetrics(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    truth = torch.randint(2, (3, 9, 11), generator=rng)
    truth[0, :2] = 255
    found = (torch.rand(3, 9, 11, generator=rng) < 0.3).long()
    confusion = ConfusionMatrix(2)
    confusion.update(found, truth)
    scores = confusion.compute().foreground()
    for name, metric in (
        ("iou", reference.BinaryJaccardIndex),
        ("dice", reference.BinaryF1Score),
        ("precision", reference.BinaryPrecision),
        ("recall", reference.BinaryRecall),
    ):
        expected = metric(ignore_index=255)(found, truth)
        assert scores[f"foreground_{name}"] == pytest.approx(float(expected), abs=1e-6)
    assert ConfusionMatrix(3).compute().foreground() == {}


def test_a_list_of_one_class_is_the_foregrounds(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("road\n")
    found = class_list(tmp_path, binary=True)
    assert found is not None and found.names == ["background", "road"] and len(found.palette) == 2


@pytest.mark.parametrize("memory", [None, "mcibipp"])
@pytest.mark.slow
def test_export(memory: str | None) -> None:
    model = centred(made(memory=memory).eval())
    program = torch.export.export(export.EvaluationForm(model), (images(),))
    logits, found = program.module()(images())
    torch.testing.assert_close(logits, model(images()).logits)
    assert torch.equal(found, predict_labels(model, images(), (40, 48)))
    assert found.any() and not found.all()


# --- commands -----------------------------------------------------------------------------------


def write(root: Path) -> Path:
    """A road that is brighter than what is around it; masks of 0 and 255."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((40, 48), np.uint8)
            mask[:, 8 + 4 * i : 28 + 4 * i] = 255
            noise = rng.integers(60, size=(40, 48, 3)) + mask[..., None] * 0.6
            Image.fromarray(noise.astype(np.uint8)).save(root / f"images/{split}/{i}.png")
            Image.fromarray(mask).save(root / f"labels/{split}/{i}.png")
    (root / "classes.txt").write_text("road\n")
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_from_data_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = write(tmp_path / "data"), tmp_path / "run"
    settings = (
        "model.backbone=test_resnet", "model.options.feats_channels=8", "optimizer.lr=0.05",
        "model.options.transform_channels=8", "epochs=30", "batch_size=4", "device=cpu",
        "workers=0", "augmentation.crop_size=[32,32]", "augmentation.scale=[1,1]",
        "augmentation.max_class_share=1", "evaluate_every=30", "model.options.one_logit=true",
    )  # fmt: skip
    command = ["train", "folder", "--root", str(root), "--out", str(run), "--quiet", "--set"]
    assert cli.main([*command, *settings]) == 2
    assert "one class (road) leaves nothing to tell apart" in capsys.readouterr().err
    assert cli.main([*command, *settings, "data.binary=true"]) == 0
    losses = [e["loss"] for e in Run(run).history() if "loss" in e]
    assert share_left(losses) < 0.8
    scores = tmp_path / "scores.json"
    for more in ([], ["--threshold", "0.3"], ["--scales", "0.75,1", "--flip"]):
        capsys.readouterr()
        assert (
            cli.main(["evaluate", str(run), "--cpu", "--quiet", "--json", str(scores), *more]) == 0
        )
        assert "Dice of road" in capsys.readouterr().out
    found = json.loads(scores.read_text())
    assert found["foreground_recall"] == found["classes"][1]["accuracy"]
    assert cli.main(
        ["predict", str(run), str(root / "images/val"), "--out", str(tmp_path / "p"), "--cpu"]
    ) == 0  # fmt: skip
    values = np.unique(np.array(Image.open(tmp_path / "p/labels/0.png")))
    assert {*values.tolist()} <= {0, 1}
    export = ["export", str(run), str(tmp_path / "model.pt2"), "--size", "40,48"]
    assert cli.main(export) == 0, capsys.readouterr().err
