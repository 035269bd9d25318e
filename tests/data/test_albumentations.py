"""A function or a pipeline of albumentations (tried: 2.0.8) as the augmentation of a training."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mcibi_fast.data import FunctionTransform
from mcibi_fast.data.functions import load_function
from mcibi_fast.data.loading import training_loader
from mcibi_fast.recipes import AugmentationConfig, ScenesData, TrainConfig
from mcibi_fast.recipes.parts import StoredAugmentationConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from tests.tiny_run import stopped_after_one_epoch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network otherwise
A = pytest.importorskip("albumentations", reason="needs albumentations")

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
IMAGE = np.random.default_rng(0).integers(256, size=(40, 44, 3), dtype=np.uint8)
LABEL = np.random.default_rng(1).integers(4, size=(40, 44), dtype=np.uint8)


def pipeline(*extra: object) -> object:
    return A.Compose(
        [A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5), *extra]
    )


def made(function: object, crop: tuple[int, int] = (32, 32), **options) -> FunctionTransform:
    return FunctionTransform(function, crop, mean=MEAN, std=STD, num_classes=4, **options)


def called(transform: FunctionTransform, *, epoch: int = 0, index: int = 0):
    image = torch.from_numpy(IMAGE).movedim(-1, 0)
    return transform(image, torch.from_numpy(LABEL), epoch=epoch, index=index)


def global_states() -> tuple:
    return (
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002
        torch.get_rng_state().tolist(),
    )


def test_a_pipeline_depends_on_the_sample_alone() -> None:
    before = global_states()
    first, label = called(made(pipeline()), index=3)
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert label.shape == (32, 32) and label.dtype == torch.uint8
    used = made(pipeline())
    for index in range(5):  # generators that have been used, as after a resume or in a worker
        called(used, index=index)
    again, same = called(used, index=3)
    assert torch.equal(first, again) and torch.equal(label, same)
    others = [
        called(used, index=4),
        called(used, epoch=1, index=3),
        called(made(pipeline(), seed=1), index=3),
    ]
    assert not any(torch.equal(first, image) for image, _ in others)
    assert global_states() == before


def test_image_and_label_are_what_the_pipeline_makes() -> None:
    image, label = called(made(A.Compose([A.HorizontalFlip(p=1.0)]), (40, 44)))
    colours = torch.tensor(IMAGE[:, ::-1].copy()).movedim(-1, 0) / 255
    expected = (colours - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(image, expected)
    assert np.array_equal(label.numpy(), LABEL[:, ::-1])


def test_a_smaller_result_is_padded() -> None:
    image, label = called(made(lambda image, label, rng: (image[:30, :20], label[:30, :20])))
    assert (image[:, 30:] == 0).all() and (image[:, :, 20:] == 0).all()
    assert (label[30:] == 255).all() and (label[:, 20:] == 255).all()
    assert np.array_equal(label[:30, :20].numpy(), LABEL[:30, :20])


def test_a_function_gets_the_samples_generator() -> None:
    def draw(image, label, rng):
        label[:] = rng.integers(4)  # its own copy
        return image[:8, :8], label[:8, :8]

    draws = [int(called(made(draw), index=i)[1][0, 0]) for i in range(30)]
    assert {*draws} == {0, 1, 2, 3}
    assert draws == [int(called(made(draw), index=i)[1][0, 0]) for i in range(30)]
    assert LABEL.max() == 3 and len(np.unique(LABEL)) == 4


def test_the_frames_of_a_clip_are_transformed_alike() -> None:
    clip = torch.from_numpy(np.stack([IMAGE, IMAGE])).movedim(-1, 1)
    label = torch.from_numpy(LABEL)
    images, mask = made(pipeline())(clip, label, epoch=0, index=2)
    assert images.shape == (2, 3, 32, 32) and mask.shape == (32, 32)
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (A.Compose([A.RandomCrop(32, 32), A.Normalize()]), "image has become float32, expected"),
        (lambda i, m, r: (i, m), "gives 40x44, more than augmentation.crop_size 32x32"),
        (lambda i, m, r: (i[:8], m[:9]), "image is 8x44, its label 9x44"),
        (lambda i, m, r: i, "expected (image, label), got ndarray"),
        (lambda i, m, r: (torch.from_numpy(i), m), "image is a Tensor, not a numpy array"),
        (lambda i, m, r: (i[..., 0], m), "image has shape (40, 44); it came as (40, 44, 3)"),
        (lambda i, m, r: (i[..., :2], m), "image has shape (40, 44, 2)"),
        (lambda i, m, r: (i, m.astype(np.int64)), "label has become int64, expected uint8"),
        (lambda i, m, r: (i, m[..., None]), "label has shape (40, 44, 1)"),
        (lambda i, m, r: (i[:8, :8], m[:8, :8] + 7), "with 4 classes; masks are interpolated"),
        (lambda i, m, r: (i, m, np.random.rand()), "global generator of numpy.random"),  # noqa: NPY002
        (lambda i, m, r: (i, m) if random.random() < 2 else 0, "global generator of random,"),
        (lambda i, m, r: (i, m) if torch.rand(()) < 2 else 0, "global generator of torch"),
    ],
)
def test_wrong_results_are_one_line(function: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        called(made(function, name="augmentation: mine"))
    assert str(caught.value).startswith("augmentation: mine: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- by name ------------------------------------------------------------------------------------

MODULE = """
import os
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A
pipeline = A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(), A.GaussNoise(p=0.5)])
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the present folder."""
    (tmp_path / "own_augmentation.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_augmentation", raising=False)
    yield "own_augmentation:pipeline"
    sys.modules.pop("own_augmentation", None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_augmentation", "expected MODULE:NAME, such as my_augmentation:pipeline"),
        ("no_such_module:f", "no_such_module cannot be imported (ModuleNotFoundError: No module"),
        ("own_augmentation:nothing", "has no attribute 'nothing'"),
        ("own_augmentation:number", "is a int, which cannot be called"),
    ],
)
def test_what_a_path_does_not_name(module: str, path: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_function(path)
    assert message in str(caught.value)


def test_workers_give_the_same_batches(module: str) -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        dataset = ScenesData(train_count=6, size=(40, 44)).dataset("train")
        config = AugmentationConfig((32, 32), function=module)
        dataset.transform = config.transform(dataset, seed=5)
        loader = training_loader(dataset, batch_size=2, seed=0, epoch=1, workers=workers)
        return [batch["image"] for batch in loader]

    for one, other in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one, other)


def test_a_stored_name_is_not_imported(module: str) -> None:
    """A run's directory may be from someone else."""
    config = TrainConfig(augmentation=AugmentationConfig((32, 32), function=module))
    stored = TrainConfig.from_dict(config.to_dict())
    assert isinstance(stored.augmentation, StoredAugmentationConfig)
    with pytest.raises(ValueError, match=r"not imported without your consent.*--augmentation own_"):
        stored.augmentation.transform(ScenesData(train_count=2).dataset("train"), 0)
    assert "own_augmentation" not in sys.modules
    assert stored.to_dict() == config.to_dict()


def test_style_mixing_is_not_silently_left_out(module: str) -> None:
    config = AugmentationConfig((32, 32), function=module, style_mixing=0.5)
    with pytest.raises(ValueError, match=r"style_mixing: not together with augmentation.function"):
        config.transform(ScenesData(train_count=2).dataset("train"), 0)


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(
    module: str, tiny_config: Callable[..., TrainConfig], tmp_path: Path, one_process: None
) -> None:
    from mcibi_fast import cli

    config = tiny_config(f"augmentation.function={module}")
    quiet = {"progress": False, "report": lambda line: None}
    seed_global_generators(7)
    whole = train(config, tmp_path / "whole", **quiet)

    seed_global_generators(7)
    stopped_after_one_epoch(config, tmp_path / "run")
    run = str(tmp_path / "run")
    assert cli.main(["train", "--resume", run, "--quiet"]) == 2
    assert cli.main(["train", "--resume", run, "--quiet", "--augmentation", "a:b"]) == 2
    assert cli.main(["train", "--resume", run, "--quiet", "--augmentation", module]) == 0
    ends = [Run(path).load_state()[0].read_bytes() for path in (whole.out, tmp_path / "run")]
    assert ends[0] == ends[1]
    other = train(tiny_config(), tmp_path / "other", **quiet)
    assert Run(other.out).load_state()[0].read_bytes() != ends[0]


@pytest.mark.slow
def test_a_pipeline_of_python(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, one_process: None
) -> None:
    config = tiny_config("epochs=1")
    result = train(config, tmp_path / "run", progress=False, report=str, augmentation=pipeline())
    assert Run(result.out).config()["augmentation"]["function"] == "Compose"
    with pytest.raises(ValueError, match=r"Compose is named by a run's config.json"):
        train(Run(result.out).settings(), result.out, resume=True, progress=False, report=str)
    again = train(
        Run(result.out).settings(),
        result.out,
        resume=True,
        progress=False,
        report=str,
        augmentation=pipeline(),
    )
    assert again.steps == result.steps
