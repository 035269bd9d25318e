"""A model trained with ``align_corners=True`` is tested, exported and drawn with it, too.

Of every framework, by itself and with a memory, against the plain definition: the logits are
resized by ``F.interpolate(..., align_corners=True)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mcibi_fast import models
from mcibi_fast.ablations.stages import StageWeights, gathering_logits
from mcibi_fast.data import Scenes
from mcibi_fast.inference import export
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.predict import predict
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import ModelSpec
from mcibi_fast.recipes import InferenceConfig
from mcibi_fast.training.train import train
from tests.models.stub_backbone import FRAMEWORKS
from tests.tiny_run import make_tiny_config

SIZE = (40, 44)
FAST = (("isnet", None), ("deeplabv3", "mcibipp"))
CASES = [
    pytest.param(case, marks=() if case in FAST else pytest.mark.slow)
    for case in ((name, memory) for name in FRAMEWORKS for memory in (None, "mcibipp"))
]


@dataclass
class Trained:
    model: models.Segmentor
    spec: ModelSpec
    images: Tensor
    labels: Tensor

    def logits(self, **options: int) -> Tensor:
        with torch.no_grad():
            return self.model(self.images, **options).logits


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "_".join(filter(None, case)))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of three steps, loaded as a user loads it; its classes share the pixels."""
    framework, memory = request.param
    config = make_tiny_config("epochs=1", "model.options.align_corners=true")
    config.model.framework, config.model.memory = framework, memory
    if memory is None:
        keep = {"transform_channels"} if framework == "isnet" else set()
        for name in {"transform_channels", "form"} - keep:
            del config.model.options[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = train(config, tmp_path_factory.mktemp("run"))
    model, spec = load_model(result.out)
    dataset = Scenes("val", count=3, size=SIZE, seed=0)
    images = torch.stack([dataset[i]["image"] for i in range(3)])
    labels = torch.stack([dataset[i]["label"] for i in range(3)])
    seen = Trained(model, spec, images, labels)
    with torch.no_grad():
        spread = seen.logits().std((0, 2, 3))
        model.head.decoder.classifier.weight /= spread[:, None, None, None]
        model.head.decoder.classifier.bias -= seen.logits().mean((0, 2, 3))
    expected, other = plain(seen.logits()), plain(seen.logits(), align_corners=False)
    assert len(expected.unique()) > 2 and (expected != other).double().mean() > 0.01
    return seen


@pytest.fixture(autouse=True)
def alone(one_process: None) -> Iterator[None]:
    yield


def plain(logits: Tensor, size: tuple[int, int] = SIZE, *, align_corners: bool = True) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).argmax(1)


def nearly_equal(labels: Tensor, expected: Tensor) -> None:
    """But for near ties, which rounding decides."""
    assert labels.shape == expected.shape
    assert (labels != expected).double().mean() < 1e-3


def test_losses(trained: Trained) -> None:
    with torch.no_grad():
        output = trained.model(trained.images, trained.labels)
    full = F.interpolate(output.logits, SIZE, mode="bilinear", align_corners=True)
    expected = F.cross_entropy(full, trained.labels.long(), ignore_index=255)
    torch.testing.assert_close(output.losses["loss_cls"], expected)


def test_evaluation(trained: Trained) -> None:
    dataset = Scenes("val", count=3, size=SIZE, seed=0)
    for inference in (InferenceConfig(), InferenceConfig(flip=True)):
        expected = plain(trained.logits())
        if inference.flip:
            with torch.no_grad():
                mirrored = trained.model(trained.images.flip(3)).logits.flip(3)
            views = (
                F.interpolate(logits, SIZE, mode="bilinear", align_corners=True).softmax(1)
                for logits in (trained.logits(), mirrored)
            )
            expected = sum(views).argmax(1)  # type: ignore[union-attr]
        matrix = evaluate(trained.model, dataset, inference=inference).matrix
        known = trained.labels != 255
        right = (expected == trained.labels) & known
        assert matrix.sum() == known.sum()
        assert abs(int(matrix.diagonal().sum()) - int(right.sum())) < 1e-3 * known.sum()


def test_prediction(trained: Trained, tmp_path: Path) -> None:
    pixels = Scenes("val", count=3, size=SIZE, seed=0).read(0)[0]
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    predict(trained.model, trained.spec, tmp_path / "scene.png", tmp_path / "out")
    written = np.asarray(Image.open(tmp_path / "out" / "labels" / "scene.png"))
    nearly_equal(torch.from_numpy(written.astype(np.int64))[None], plain(trained.logits())[:1])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_export(trained: Trained, suffix: str, tmp_path: Path) -> None:
    """What the file computes, and what its checker says of it."""
    out = tmp_path / f"model{suffix}"
    image = trained.images[:1]
    (agreement, *_) = export.save(trained.model, trained.spec, out, size=SIZE, image=image)
    content = out.read_bytes()
    run = export.onnx_runner(content) if suffix == ".onnx" else export.program_runner(content)
    nearly_equal(run(trained.images)[1], plain(trained.logits()))
    assert agreement.mistaken <= 2
    # The checker notices class maps that were upsampled the other way.
    wrong = export.compare(
        trained.model,
        lambda images: (run(images)[0], plain(run(images)[0], align_corners=False)),
        image,
    )
    with pytest.raises(ValueError, match="pixels have another class"):
        wrong.check()


def test_stages(trained: Trained) -> None:
    """W of the second stage (Eq. 17), and the class map that W itself gives."""
    model = trained.model
    if not model.head.has_memory:
        assert trained.spec.name in models.frameworks()  # by itself: there are no stages
        return
    with torch.no_grad():
        first = model(trained.images)
        W = first.context_logits if model.head.weights_from == "cwi" else first.weight_logits
        O = F.interpolate(first.logits.softmax(1), W.shape[2:], mode="bilinear", align_corners=True)
        expected = (O + W.softmax(1)) / 2
        gathered = gathering_logits(model, trained.images, 2).softmax(1)
    torch.testing.assert_close(gathered, expected)
    maps = StageWeights(model, 2)
    assert maps.head.align_corners
    with torch.no_grad():
        labels = maps.head.class_map(maps(trained.images).logits, SIZE)
    nearly_equal(labels, plain(expected))
