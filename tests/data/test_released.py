"""Preparing a test image as the released code does, beside OpenCV and the released package."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mcibi_fast.data import EvalTransform, Scenes
from mcibi_fast.data.released import released_normalise, released_resize, released_sides
from mcibi_fast.data.transforms import under_protocol

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int) -> Tensor:
    rng = np.random.default_rng((height, width))
    return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


def test_bytes_are_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    rng = np.random.default_rng(0)
    halves = [(64, 48, 32, 24), (17, 31, 8, 15), (9, 9, 1, 1)]
    usual = [(375, 500, 512, 683), (683, 1023, 512, 767), (97, 61, 473, 473), (1, 7, 5, 3)]
    drawn = [tuple(map(int, rng.integers(1, 120, 4))) for _ in range(300)]
    for height, width, *size in [*halves, *usual, *drawn]:
        image = picture(height, width)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        expected = cv2.resize(pixels, tuple(size[::-1]), interpolation=cv2.INTER_LINEAR)
        expected = expected.reshape(*size, 3)
        found = released_resize(image, size).permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected), (height, width, *size)


def test_it_is_bilinear_without_filtering() -> None:
    """Independent of OpenCV: within a rounding of the plain formula, far from a filtered one."""
    image = picture(60, 90)
    plain = torch.nn.functional.interpolate(image[None].double(), (20, 31), mode="bilinear")[0]
    found = released_resize(image, (20, 31)).double()
    assert (found - plain).abs().max() < 1
    filtered = EvalTransform(mean=MEAN, std=STD, size=(20, 31)).resized(image).double()
    assert (found - filtered).abs().max() > 50


def test_numbers_are_those_of_the_released_normalisation() -> None:
    transforms = pytest.importorskip(
        "ssseg.modules.datasets.pipelines.transforms",
        reason="needs the authors' package (sssegmentation)",
    )
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[..., None]
    mean, std = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    expected = transforms.Normalize(mean, std)({"image": pixels})["image"]
    found = released_normalise(image, MEAN, STD).permute(1, 2, 0).numpy()
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_sides_are_those_of_the_released_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = pytest.importorskip(
        "ssseg.modules.datasets.pipelines.transforms",
        reason="needs the authors' package (sssegmentation)",
    )
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        transforms.Resize, "resize", lambda _, key, sample, sides, __: asked.append(sides) or sample
    )
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(side) for side in rng.integers(100, 3000, 2))
        short, long = (int(side) for side in rng.integers(100, 2500, 2))
        sample = {"image": SimpleNamespace(shape=(height, width, 3))}
        transforms.Resize((long, short), keep_ratio=True, scale_range=None)(sample)
        transforms.Resize((short, long), keep_ratio=False, scale_range=None)(sample)
        assert [sides[::-1] for sides in asked[::3]] == [
            tuple(released_sides((height, width), None, short, long)),
            tuple(released_sides((height, width), (short, long), None, None)),
        ]
        asked.clear()


def test_a_dataset_under_a_protocol_stays_as_it_is() -> None:
    dataset = Scenes("val", count=1, size=(64, 64), seed=0)
    released = under_protocol(dataset, "released")
    assert dataset.transform is None and under_protocol(dataset, "own") is dataset
    image = torch.from_numpy(dataset.read(0)[0]).permute(2, 0, 1)
    expected = released_normalise(image, dataset.mean, dataset.std)
    assert torch.equal(released[0]["image"], expected)
    assert not torch.equal(dataset[0]["image"], expected)  # the same formula, rounded otherwise
    dataset.transform = EvalTransform(mean=MEAN, std=STD, short_side=50)
    released = under_protocol(dataset, "released")
    assert torch.equal(
        released[0]["image"],
        released_normalise(released_resize(image, (50, 50)), MEAN, STD),
    )
    assert dataset.transform.protocol == "own"
    again = under_protocol(released, "own")
    assert torch.equal(again[0]["image"], dataset[0]["image"])
    with pytest.raises(ValueError, match="protocol: 'other' is not one of own, released"):
        EvalTransform(mean=MEAN, std=STD, protocol="other")  # type: ignore[arg-type]


def test_sides_are_rounded_half_up() -> None:
    sides = (1024, 1025)
    assert released_sides(sides, None, 512, 2048) == [512, 513]
    assert EvalTransform(mean=MEAN, std=STD, short_side=512).resized(
        torch.zeros(3, *sides, dtype=torch.uint8)
    ).shape[1:] == (512, 512)  # half to even
    assert released_sides((1024, 768), (100, 200), None, None) == [200, 100]
    assert released_sides((768, 1024), (100, 200), None, None) == [100, 200]
    assert released_sides((7, 9), None, None, None) == [7, 9]
