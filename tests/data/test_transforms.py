from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mcibi_fast.data import EvalTransform, Scenes, TrainTransform
from mcibi_fast.data.transforms import largest_share

pytest.importorskip("torchvision", exc_type=ImportError, reason="needs torchvision")

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def stripes(height: int = 60, width: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """A label of 6x10 blocks, 0..44, and an image whose grey value is 5 times the label."""
    rows, columns = torch.arange(height) // 12, torch.arange(width) // 10
    label = (rows[:, None] * 9 + columns[None]).to(torch.uint8)
    return (label * 5)[None].repeat(3, 1, 1), label


def train(crop=32, **options) -> TrainTransform:
    return TrainTransform(crop, **{**PLAIN, **options})


def call(transform, epoch=0, index=0):
    return transform(*stripes(), epoch=epoch, index=index)


def test_same_seed_epoch_and_index_same_result():
    for index in range(5):
        image, label = call(train(seed=3), epoch=2, index=index)
        again = call(pickle.loads(pickle.dumps(train(seed=3))), epoch=2, index=index)
        assert torch.equal(image, again[0])
        assert torch.equal(label, again[1])


def test_seed_epoch_and_index_each_change_the_result():
    results = [
        call(train(seed=seed), epoch=epoch, index=index)[0].numpy().tobytes()
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    ]
    assert len(set(results)) == 27


def test_shapes_and_dtypes():
    for crop in (32, (32, 48), (200, 160)):
        height, width = crop if isinstance(crop, tuple) else (crop, crop)
        for index in range(6):
            image, label = call(train(crop), index=index)
            assert image.shape == (3, height, width)
            assert image.dtype == torch.float32
            assert label.shape == (height, width)
            assert label.dtype == torch.uint8
            assert image.is_contiguous()
            assert label.is_contiguous()


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_stay_aligned(monkeypatch, axis):
    """Both encode where a pixel came from, the image twice the label: half a pixel apart at most,
    and on average none."""
    monkeypatch.setattr("mcibi_fast.data.transforms.distort", lambda planes, distortion: None)
    place = torch.arange(90, dtype=torch.uint8).expand(60, 90)
    label = place if axis == 1 else torch.arange(60, dtype=torch.uint8)[:, None].expand(60, 90)
    image = (label * 2)[None].repeat(3, 1, 1)
    apart, flipped = [], set()
    for index in range(60):
        out, mask = train(40)(image, label, epoch=0, index=index)
        rows, columns = (mask != 255).nonzero().amax(0) + 1
        out, mask = out[0, :rows, :columns] * 255 / 2, mask[:rows, :columns].float()
        apart.append((out - mask).mean())
        assert (out - mask).abs().max() < 0.5 + 0.5
        flipped.add(bool((mask[0].diff() < 0).any()))
    assert abs(torch.stack(apart).mean()) < 0.05
    assert flipped == ({True, False} if axis == 1 else {False})


def test_scale_range_is_respected():
    """A block of 12x10 pixels becomes 12s x 10s."""
    widths = []
    for index in range(200):
        label = call(train((150, 220), max_class_share=1.0), index=index)[1]
        widths.append(int((label[0] != 255).sum()) / 90)
    assert 0.5 <= min(widths) < 0.6
    assert 1.9 < max(widths) <= 2.0
    assert np.mean(widths) == pytest.approx(1.25, abs=0.1)


def test_the_scale_multiplies_the_size_asked_for():
    for options, sides in (({"short_side": 30}, (30, 45)), ({"size": (44, 32)}, (44, 32))):
        for scale in (0.5, 1.25):
            transform = train((90, 90), scale=(scale, scale), max_class_share=1.0, **options)
            label = call(transform)[1]
            shown = (label != 255).nonzero().amax(0) + 1
            assert shown.tolist() == [round(side * scale) for side in sides]


def test_a_flip_swaps_the_pairs_and_nothing_else():
    """Classes 1 and 2 stand for left and right, 3 and 4 too: each keeps to its side."""
    label = torch.zeros(20, 30, dtype=torch.uint8)
    label[:, :10], label[:, 20:] = 1, 2
    label[15:, :10], label[15:, 20:] = 3, 4
    label[0] = 255
    image = label.clone().clamp_max(5)[None].repeat(3, 1, 1) * 40
    options = {"scale": (1.0, 1.0), "max_class_share": 1.0}
    flipped = 0
    for index in range(20):
        plain, mirrored = (
            train((20, 30), flip_pairs=pairs, **options)(image, label, epoch=0, index=index)
            for pairs in ((), ((1, 2), (3, 4)))
        )
        assert torch.equal(plain[0], mirrored[0])
        assert torch.equal(mirrored[1], label)
        flipped += not torch.equal(plain[1], label)
    assert 4 < flipped < 16


def test_rotation_keeps_image_and_label_aligned(monkeypatch):
    """A disc off the middle: where the label has it the image has it, but for its rim."""
    monkeypatch.setattr("mcibi_fast.data.transforms.distort", lambda planes, distortion: None)
    y, x = torch.meshgrid(torch.arange(81.0), torch.arange(81.0), indexing="ij")
    label = ((y - 40) ** 2 + (x - 60) ** 2 < 100).to(torch.uint8)
    image = (label * 200)[None].repeat(3, 1, 1)
    options = {"scale": (1.0, 1.0), "max_class_share": 1.0, "rotation": 30}
    angles, still = [], 0
    for index in range(200):
        transform = train((81, 81), rotation_probability=0.6, **options)
        out, mask = transform(image, label, epoch=0, index=index)
        rows, columns = (mask == 1).nonzero().float().mean(0)
        assert (rows - 40).square() + (columns - 40).square() == pytest.approx(400, rel=0.02)
        assert (mask[out[0] * 255 > 150] == 1).float().mean() > 0.95
        assert (mask[(out[0] * 255 < 50)] != 1).all()
        angle = torch.atan2(rows - 40, (columns - 40).abs()).rad2deg()
        still += bool(abs(angle) < 1e-3)
        angles.append(float(angle))
    assert 28 < max(angles) < 31 and -31 < min(angles) < -28
    assert 0.3 < still / 200 < 0.5, "0.4 of all stay as they are"


def test_corners_that_come_into_view_are_padding():
    mean = (0.4, 0.5, 0.6)
    image, label = torch.zeros(3, 60, 60, dtype=torch.uint8), torch.ones(60, 60, dtype=torch.int64)
    options = {"scale": (1.0, 1.0), "rotation": 30, "rotation_probability": 1.0, "mean": mean}
    out, mask = train((60, 60), **options)(image, label, epoch=0, index=1)
    corner = mask == 255
    assert 0 < corner.float().mean() < 0.3
    assert mask.dtype == torch.int64
    assert (out[:, corner] == 0).float().mean() > 0.8, "but for the slanted edges"
    assert (out[:, ~corner] == 0).float().mean() < 0.05


def test_rotation_is_drawn_from_the_seed_and_leaves_the_rest_as_it_was():
    options = {"rotation": 20, "rotation_probability": 0.5}
    for index in range(4):
        first, again = (call(train(seed=3, **options), index=index) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    # Without rotation nothing is drawn for it.
    plain = call(train(seed=3))
    assert torch.equal(plain[0], call(train(seed=3, rotation_probability=0.9))[0])


def test_padding_is_ignored_and_mean_coloured():
    image, label = train((100, 100), scale=(0.5, 0.5))(*stripes(), epoch=0, index=0)
    assert (label[:30, :45] != 255).all()
    assert (label[30:] == 255).all()
    assert (label[:, 45:] == 255).all()
    assert (image[:, 30:] == 0).all()
    assert (image[:, :, 45:] == 0).all()


def test_no_class_fills_more_than_75_percent_of_a_crop_where_that_can_be_had():
    label = torch.zeros(100, 100, dtype=torch.uint8)
    label[:, 50:] = 1
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)

    def shares(limit: float) -> np.ndarray:
        transform = train((40, 40), scale=(1.0, 1.0), max_class_share=limit)
        return np.array(
            [largest_share(transform(image, label, epoch=0, index=i)[1]) for i in range(300)]
        )

    # A crop starts at one of 61 columns, and 21 of them give at most 75%: without the rule two
    # thirds break it, with ten tries (40/61)^10 = 1.5%.
    assert (shares(1.0) > 0.75).mean() > 0.5
    assert (shares(0.75) > 0.75).mean() < 0.05


def test_a_uniform_or_unlabelled_image_still_gives_a_crop():
    for value in (3, 255):
        label = torch.full((50, 50), value, dtype=torch.uint8)
        out = train((20, 20), scale=(1.0, 1.0))(
            torch.zeros(3, 50, 50, dtype=torch.uint8), label, epoch=0, index=0
        )
        assert (out[1] == value).all()


def test_ignored_pixels_do_not_count_towards_the_share():
    label = torch.tensor([[0, 0, 0, 1], [255, 255, 255, 255]], dtype=torch.uint8)
    assert largest_share(label) == 0.75
    assert largest_share(torch.full((2, 2), 255, dtype=torch.uint8)) == 1.0


def test_distortion_changes_colours_and_nothing_else():
    image, _ = Scenes("train", count=1, size=64, seed=0).read(0)
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())
    label = torch.arange(4096).reshape(64, 64) % 250
    outputs = [
        train(64, scale=(1.0, 1.0))(image, label, epoch=0, index=index) for index in range(100)
    ]
    kept = 0
    for out, mask in outputs:
        straight = torch.equal(mask, label)
        assert straight or torch.equal(mask, label.flip(-1))
        original = image if straight else image.flip(-1)
        assert out.min() >= 0
        assert out.max() <= 1
        kept += torch.equal(out, original.float() / 255)
    assert 0 < kept < 20, "each distortion is applied with probability 1/2: 1 in 16 has none"


def test_global_generators_are_untouched():
    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), pickle.dumps(numpy_state), random.getstate()

    before = states()
    dataset = Scenes("train", count=6, size=48, seed=0, transform=train(32))
    for i in range(6):
        dataset[i]
    assert states() == before


def test_workers_threads_and_order_change_nothing():
    def epoch(**loader) -> torch.Tensor:
        dataset = Scenes("train", count=8, size=80, seed=0, transform=train(64))
        dataset.set_epoch(5)
        return torch.cat([batch["image"] for batch in DataLoader(dataset, **loader)])

    alone = epoch(batch_size=1)
    assert torch.equal(alone, epoch(batch_size=4, num_workers=2))
    assert torch.equal(alone.flip(0), epoch(batch_size=2, sampler=range(7, -1, -1)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(alone, epoch(batch_size=1))
    finally:
        torch.set_num_threads(threads)


def test_next_epoch_differs():
    dataset = Scenes("train", count=2, size=48, seed=0, transform=train(32))
    first = dataset[0]["image"]
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0]["image"])
    dataset.set_epoch(0)
    assert torch.equal(first, dataset[0]["image"])


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((37, 53), {}, (37, 53)),
        ((60, 90), {"short_side": 30}, (30, 45)),
        ((60, 90), {"short_side": 40, "long_side": 2048}, (40, 60)),
        ((60, 240), {"short_side": 60, "long_side": 100}, (25, 100)),
        ((60, 240), {"short_side": 100, "long_side": 100}, (25, 100)),
        ((60, 90), {"size": (47, 31)}, (47, 31)),
    ],
)
def test_evaluation_resizes_the_image_and_keeps_the_label(size, options, expected):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    label = torch.randint(5, size, generator=generator, dtype=torch.uint8)
    transform = EvalTransform(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), **options)
    out, mask = transform(image, label)
    assert out.shape == (3, *expected)
    assert torch.equal(mask, label)
    if not options:
        restored = out * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        restored += torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(restored * 255, image.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0}, "crop_size"),
        ({"seed": -1}, "seed: -1 is negative"),
        ({"scale": (2.0, 0.5)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"rotation": -1}, "rotation: -1 is no angle"),
        ({"rotation": 30, "rotation_probability": 1.5}, r"rotation_probability: 1.5 is not in"),
        ({"size": (0, 10)}, r"size: \(0, 10\) is not positive"),
        ({"size": (10, 10), "short_side": 10}, "size: fixes both sides"),
        ({"long_side": 10}, "long_side"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_long_side_needs_short_side():
    with pytest.raises(ValueError, match="long_side"):
        EvalTransform(long_side=10, **PLAIN)


@pytest.mark.parametrize("sides", [(1, 1), (7, 1), (3, 1), (1, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 3, 20, 30), (3, 20, 1), (3, 1, 30)], ids=str)
def test_resizing_to_few_pixels(sides: tuple[int, int], shape: tuple[int, ...]) -> None:
    """For uint8 and a width of 1, PyTorch's own kernel fails, or averages the wrong pixels."""
    image = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    flat = image.double().reshape(-1, 1, *shape[-2:])
    exact = F.interpolate(flat, sides, mode="bilinear", antialias=True).reshape(*shape[:-2], *sides)
    transform = EvalTransform(mean=(0.0,) * 3, std=(1 / 255,) * 3, size=sides)
    resized, _ = transform(image, torch.zeros(sides, dtype=torch.uint8))
    assert resized.shape == exact.shape
    assert (resized.double() - exact).abs().max() <= 1.01  # rounded along each axis
    crop = TrainTransform(sides, mean=(0.0,) * 3, std=(1.0,) * 3, size=sides, scale=(1.0, 1.0))
    label = torch.zeros(shape[-2:], dtype=torch.uint8)
    assert crop(image, label, epoch=0, index=0)[0].shape == exact.shape


@pytest.mark.parametrize("name", ["short_side", "long_side", "size"])
def test_sides_of_zero_are_refused(name: str) -> None:
    options = {"short_side": 4} if name == "long_side" else {}
    options[name] = (4, 0) if name == "size" else 0
    with pytest.raises(ValueError, match=rf"{name}: .*0\)? is not positive"):
        EvalTransform(mean=(0.0,) * 3, std=(1.0,) * 3, **options)
