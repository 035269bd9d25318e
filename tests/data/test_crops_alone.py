"""A training crop is what resizing, cropping and torchvision's distortion would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mcibi_fast.data import FolderDataset, TrainTransform
from mcibi_fast.data.base import normalise
from mcibi_fast.data.distortion import Distortion, distort, draw_distortion
from mcibi_fast.data.resizing import resize_image, resize_image_window, resize_label_window
from mcibi_fast.data.transforms import largest_share

pytest.importorskip("torchvision", exc_type=ImportError, reason="needs torchvision")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def colours(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours with noise: (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    image = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")[0]
    noise = torch.rand(3, height, width, generator=generator)
    return (image * 220 + noise * 35).to(torch.uint8)


def by_torchvision(planes: Tensor, change: Distortion) -> Tensor:
    """The changes one after another, of colours from 0 to 1 in float64."""
    from torchvision.transforms.v2 import functional as tv

    image = planes.double() / 255
    if change.brightness is not None:
        image = tv.adjust_brightness(image, change.brightness)
    if change.contrast is not None and change.contrast_first:
        image = tv.adjust_contrast(image, change.contrast)
    if change.saturation is not None:
        image = tv.adjust_saturation(image, change.saturation)
    if change.hue is not None:
        image = tv.adjust_hue(image, change.hue)
    if change.contrast is not None and not change.contrast_first:
        image = tv.adjust_contrast(image, change.contrast)
    return image * 255


def test_distortion_is_torchvisions() -> None:
    image = colours(60, 70)
    image[:, :5] = torch.tensor([[0, 255, 7], [0, 255, 7], [0, 255, 7]])[:, :1, None]  # grey
    image[:, 5:9] = torch.tensor([200, 200, 10])[:, None, None]  # two colours alike
    image[:, 9:12] = torch.tensor([30, 10, 30])[:, None, None]
    image[:, 12:14] = 255
    image[0, 14:16], image[1:, 14:16] = 255, 0
    seen = set()
    for index in range(60):
        change = draw_distortion(np.random.default_rng(index))
        planes = image.float()
        distort(planes, change)
        assert (planes - by_torchvision(image, change)).abs().max() < 2e-3, change
        seen.add(tuple(value is None for value in change[:4]))
    assert len(seen) == 16


@pytest.mark.parametrize("turn", [-1 / 6, -0.05, -1e-3, 0.0, 0.02, 0.1, 1 / 6])
def test_every_colour_turns(turn: float) -> None:
    steps = torch.arange(0, 256, 17.0)
    planes = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).reshape(3, 64, 64)
    expected = by_torchvision(planes, Distortion(hue=turn))
    distort(planes, Distortion(hue=turn))
    assert (planes - expected).abs().max() < 2e-3


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_windows_are_cut_from_the_resized_image(layout: str) -> None:
    """Also where Pillow resizes the window alone: up to the rounding of both, as at the borders."""
    rng = np.random.default_rng(0)
    image = colours(50, 70)
    if layout == "pixels":
        image = image.movedim(0, -1).contiguous().movedim(-1, 0)
    alone = 0
    for _ in range(60):
        size = [int(rng.integers(8, 200)), int(rng.integers(8, 200))]
        sides = [int(rng.integers(1, s + 1)) for s in size]
        starts = [
            int(rng.choice([0, s - n, rng.integers(s - n + 1)]))
            for s, n in zip(size, sides, strict=True)
        ]
        rows, columns = (slice(a, a + n) for a, n in zip(starts, sides, strict=True))
        expected = resize_image(image, size)[:, rows, columns].int()
        result = resize_image_window(image, size, (rows, columns))
        assert result.dtype == torch.uint8 and result.shape == expected.shape
        assert (result.int() - expected).abs().max() <= 1
        alone += size[0] * size[1] > 3 * sides[0] * sides[1]
        clip = torch.stack([image, image.flip(1)])
        both = resize_image_window(clip, size, (rows, columns))
        assert torch.equal(both[0], result)
    assert alone > 20


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_labels_are_those_of_the_nearest_pixels(dtype: torch.dtype) -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    rng = np.random.default_rng(0)
    for _ in range(80):
        old = rng.integers(1, 400, 2)
        label = torch.from_numpy(rng.integers(0, 200, old)).to(dtype)
        size = rng.integers(1, 600, 2).tolist()
        whole = resize(label[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
        rows = slice(size[0] // 3, size[0])
        columns = slice(0, max(1, size[1] // 2))
        crop = resize_label_window(label, size, (rows, columns))
        assert torch.equal(crop, whole[rows, columns])


def plain_transform(
    image: Tensor, label: Tensor, crop: tuple[int, int], *, seed: int, epoch: int, index: int
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip, distort, normalise and pad, one after another and with torchvision."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import pad, resize

    rng = np.random.default_rng((seed, epoch, index))
    factor = rng.uniform(0.5, 2.0)
    size = [round(side * factor) for side in label.shape]
    image = resize_image(image.contiguous(), size)
    label = resize(label[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    height, width = (min(c, s) for c, s in zip(crop, size, strict=True))
    for _ in range(10):
        top = int(rng.integers(size[0] - height + 1))
        left = int(rng.integers(size[1] - width + 1))
        window = (..., slice(top, top + height), slice(left, left + width))
        if largest_share(label[window]) <= 0.75:
            break
    image, label = image[window], label[window]
    if rng.random() < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    distorted = by_torchvision(image, draw_distortion(rng)) / 255
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (MEAN, STD))
    padding = [0, 0, crop[1] - width, crop[0] - height]
    return pad((distorted - mean) / std, padding, fill=0.0), pad(label[None], padding, fill=255)[0]


@pytest.mark.parametrize("crop", [(40, 56), (24, 24), (90, 130)], ids=str)
def test_the_same_seed_gives_the_crop_of_the_plain_transform(crop: tuple[int, int]) -> None:
    """Labels are equal; colours to a level of the resized image, which contrast may double."""
    generator = torch.Generator().manual_seed(1)
    image = colours(48, 64)
    label = torch.randint(0, 3, (6, 8), generator=generator, dtype=torch.uint8)
    label = label.repeat_interleave(8, 0).repeat_interleave(8, 1)
    transform = TrainTransform(crop, mean=MEAN, std=STD, seed=3)
    for index in range(25):
        made, mask = transform(image, label, epoch=2, index=index)
        expected, labels = plain_transform(image, label, crop, seed=3, epoch=2, index=index)
        assert torch.equal(mask, labels)
        apart = (made - expected).abs() * torch.tensor(STD)[:, None, None] * 255
        assert apart.max() <= 1.125 * 1.5 * 1.5 * 2
        assert apart.mean() < 0.3


def test_without_distortion_the_crop_is_normalised_like_any_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mcibi_fast.data.transforms.draw_distortion", lambda rng: Distortion())
    image, label = colours(30, 40), torch.arange(1200, dtype=torch.uint8).view(30, 40)
    transform = TrainTransform((30, 40), mean=MEAN, std=STD, scale=(1.0, 1.0))
    made, mask = transform(image, label, epoch=0, index=0)
    flipped = not torch.equal(mask, label)
    expected = normalise(image.flip(-1) if flipped else image, MEAN, STD)
    assert torch.equal(made, expected)


def test_read_only_pixels_and_any_layout_are_taken(tmp_path) -> None:
    """A dataset may return views of what it keeps."""
    from PIL import Image

    for folder, content in (("images", (30, 40, 3)), ("labels", (30, 40))):
        (tmp_path / folder / "train").mkdir(parents=True)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 2, content, dtype=np.uint8))
        picture.save(tmp_path / folder / "train/a.png")
    dataset = FolderDataset(tmp_path, "train", classes=["a", "b"])
    pixels, mask = dataset.read(0)
    fixed = np.broadcast_to(pixels[:1, :1], pixels.shape)
    assert not fixed.flags.writeable
    for transform in (None, TrainTransform(16, mean=MEAN, std=STD)):
        dataset.transform = transform
        image, _ = dataset.transformed(fixed, mask, 0)
        assert image.is_contiguous() and image.dtype == torch.float32
        assert torch.equal(image, dataset.transformed(np.array(fixed), mask, 0)[0])
