"""What a model gathers, against computations that share nothing with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast import models
from mcibi_fast.data import Scenes
from mcibi_fast.models import Segmentor
from mcibi_fast.nn.iterative import mix_logits, mix_probabilities
from mcibi_fast.reports.gathering import (
    class_vectors,
    collect,
    context_of,
    gather,
    gaussian_memory_of,
    weight_of_class,
    weight_of_truth,
)

K = 12
Make = Callable[..., Segmentor]


@pytest.fixture
def make() -> Iterator[Make]:
    def build(name: str, **options: object) -> Segmentor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = models.create(name, K, backbone="test_resnet", feats_channels=8, **options)
        return model.eval()

    yield build


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 3, 40, 48, generator=generator)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gathers_what_the_model_itself_does(make: Make, images: Tensor, form: str) -> None:
    model = make("fcn_mcibipp", transform_channels=16, form=form)
    seen = gather(model, images, stages=2)
    with torch.no_grad():
        expected = model(images, stages=2)
        R = model.pixel_representations(images)
        once = model(images, stages=1)
    assert torch.equal(seen.output.logits, expected.logits)
    assert torch.equal(seen.features, R)
    first, second = seen.weight_logits
    assert torch.equal(first, expected.weight_logits)
    mix = mix_probabilities if form == "paper" else mix_logits
    torch.testing.assert_close(second, mix(first, once.logits))
    # R_aug of each stage is what the decoder turns into the logits of that stage.
    with torch.no_grad():
        for augmented, output in zip(seen.augmented, (once, expected), strict=True):
            torch.testing.assert_close(model.head.classify(augmented, None), output.logits)
    # Nothing of the recording is left behind.
    assert "gather" not in vars(model.head.context) and "prepare" not in vars(model.head.context)


def test_weights_of_a_within_image_head_are_those_that_gather(make: Make, images: Tensor) -> None:
    model = make("pspnet_mcibipp", transform_channels=8)  # released: the within-image head's
    seen = gather(model, images)
    assert seen.output.context_logits is not None
    assert torch.equal(seen.weight_logits[0], seen.output.context_logits)


def test_recording_ends_when_the_model_fails(make: Make) -> None:
    model = make("fcn_mcibipp", transform_channels=8)
    with pytest.raises(ValueError, match="images"):
        gather(model, torch.zeros(3, 8, 8))
    assert "gather" not in vars(model.head.context)


def test_a_baseline_has_features_only(make: Make, images: Tensor) -> None:
    model = make("fcn")
    seen = gather(model, images)
    assert seen.weight_logits == [] and seen.augmented == []
    assert context_of(model) is None and gaussian_memory_of(model) is None
    with torch.no_grad():
        torch.testing.assert_close(seen.features, model.pixel_representations(images))
        torch.testing.assert_close(seen.output.logits, model(images).logits)


@pytest.mark.parametrize("align", [False, True])
def test_heat_map_is_the_softmax_at_the_right_class(
    generator: torch.Generator, align: bool
) -> None:
    logits = 3 * torch.randn(K, 5, 6, generator=generator)
    label = torch.randint(K, (40, 48), generator=generator, dtype=torch.uint8)
    label[3:7, 10:] = 255
    probabilities = logits.softmax(0)[None]
    full = F.interpolate(probabilities, (40, 48), mode="bilinear", align_corners=align)[0]
    expected = full.gather(0, label.long().clamp(max=K - 1)[None])[0]
    found = weight_of_truth(logits, label, align_corners=align)
    known = label != 255
    torch.testing.assert_close(found[known], expected[known])
    assert found[~known].isnan().all() and not found[known].isnan().any()
    one = weight_of_class(logits, 4, (40, 48), align_corners=align)
    torch.testing.assert_close(one, full[4])
    # At the weights' own size nothing is resized: the softmax itself.
    small = torch.randint(K, (5, 6), generator=generator)
    own = logits.softmax(0).gather(0, small[None])[0]
    torch.testing.assert_close(weight_of_truth(logits, small, align_corners=align), own)


def test_heat_map_forms_nothing_of_full_size_per_class(generator: torch.Generator) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, Tensor):
                    self.size = max(self.size, value.numel())
            return result

    logits = torch.randn(K, 5, 6, generator=generator)
    label = torch.randint(K, (160, 192), generator=generator)
    with Largest() as largest:
        weight_of_truth(logits, label)
    assert largest.size <= 2 * label.numel()


@pytest.mark.parametrize("align", [False, True])
def test_class_vectors_are_means_under_the_masks(generator: torch.Generator, align: bool) -> None:
    features = torch.randn(1, 7, 5, 6, generator=generator)
    label = torch.randint(4, (40, 48), generator=generator, dtype=torch.uint8)
    label[label == 2] = 255
    classes, vectors = class_vectors(features, label, K, align_corners=align)
    full = F.interpolate(features, (40, 48), mode="bilinear", align_corners=align)[0]
    assert classes.tolist() == [0, 1, 3]
    for k, vector in zip(classes.tolist(), vectors, strict=True):
        torch.testing.assert_close(vector, full[:, label == k].mean(1))


def test_collection_has_a_vector_per_image_and_class(make: Make) -> None:
    dataset = Scenes("val", count=6, size=32, seed=0)
    model = make("fcn_mcibipp", transform_channels=8)
    before = torch.random.get_rng_state()
    found = collect(model, dataset, [1, 4])
    assert torch.equal(before, torch.random.get_rng_state())
    present = [[k for k in np.unique(dataset.read(i)[1]).tolist() if k != 255] for i in (1, 4)]
    assert found.classes.tolist() == present[0] + present[1]
    assert found.R_aug is not None and found.C_dl is not None
    assert found.R.shape == found.R_aug.shape == (len(found.classes), 8)
    assert np.array_equal(found.C_dl, model.memory.representations().numpy())
    # The second image's, by hand.
    sample = dataset[4]
    with torch.no_grad():
        R = model.pixel_representations(sample["image"][None])
        R_aug = model.head.context.augment(R, model.head.context.weight_head(R))
    for mine, features in ((found.R, R), (found.R_aug, R_aug)):
        full = F.interpolate(features, (32, 32), mode="bilinear")[0]
        k = present[1][-1]
        np.testing.assert_allclose(
            mine[-1], full[:, sample["label"] == k].mean(1).numpy(), atol=1e-5
        )
    baseline = collect(make("fcn"), dataset, [1, 4])
    assert baseline.R_aug is None and baseline.C_dl is None
    assert np.array_equal(baseline.classes, found.classes)
