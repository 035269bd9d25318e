"""A model with ``align_corners`` is drawn with it: in predictions, weights and features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.data import Scenes
from mcibi_fast.models import Segmentor
from mcibi_fast.reports import predictions, weight_maps
from mcibi_fast.reports.gathering import collect
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.samples import Samples, Trained
from tests.models.stub_backbone import NAMES

K = 12
NAMES = [name for name in NAMES if "_mcibi" not in name or name.endswith("_mcibipp")]
NAMES = [name for name in NAMES if "_video" not in name]


def upsample(maps: Tensor, align: bool) -> Tensor:
    return F.interpolate(maps, (32, 40), mode="bilinear", align_corners=align)


def various(model: Segmentor, images: Tensor) -> Segmentor:
    """The model with all classes in its predictions: its classifiers' outputs have mean 0."""

    def centre(layer: nn.Conv2d, args: object, output: Tensor) -> Tensor:
        mean = output.mean((0, 2, 3))
        assert layer.bias is not None
        layer.bias -= mean
        return output - mean[:, None, None]

    classifiers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == K]
    handles = [layer.register_forward_hook(centre) for layer in classifiers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return model


def shown(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[Any]]]:
    """The maps that the sheets are given, by the names of models or stages."""
    given: list[dict[str, list[Any]]] = []
    draw = getattr(module, name)

    def spy(scenes: Any, maps: Any, *rest: Any) -> Any:
        given.append(maps)
        return draw(scenes, maps, *rest)

    monkeypatch.setattr(module, name, spy)
    return given


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn(name: str, align: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Scenes("val", count=2, size=(32, 40), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(name, K, "test_resnet", feats_channels=8, align_corners=align).eval()
    images = torch.stack([dataset[i]["image"] for i in range(2)])
    trained, samples = [Trained("model", various(model, images))], Samples(dataset, 2)
    labels = torch.stack(samples.labels).long()
    with torch.no_grad():
        logits = model(images).logits
        R = model.pixel_representations(images)

    given = shown(predictions, "prediction_sheet", monkeypatch)
    predictions.add_predictions(Report("page"), trained, samples)
    expected, other = (upsample(logits, a).argmax(1).numpy() for a in (align, not align))
    assert (np.stack(given[0]["model"]) != expected).mean() < 0.005, "more than near ties"
    assert (other != expected).mean() > 0.01, "the two interpolations must differ here"

    found = collect(model, dataset, [0, 1])
    means = [
        upsample(R, align)[i][:, labels[i] == k].mean(1)
        for i in range(2)
        for k in labels[i].unique().tolist()
        if k != 255
    ]
    np.testing.assert_allclose(found.R, torch.stack(means).numpy(), atol=1e-5)

    if not model.head.has_memory:
        return
    given = shown(weight_maps, "weight_sheet", monkeypatch)
    weight_maps.add_weights(Report("page"), trained, samples)
    with torch.no_grad():
        output = model(images)
    gathered = output.weight_logits if model.head.weights_from == "pr" else output.context_logits
    W = upsample(gathered.softmax(1), align)
    right = W.gather(1, labels.clamp(max=K - 1)[:, None])[:, 0].numpy()
    known = labels.numpy() != 255
    drawn = np.stack(given[0]["W of the right class, stage 1"])
    np.testing.assert_allclose(drawn[known], right[known], atol=1e-5)
