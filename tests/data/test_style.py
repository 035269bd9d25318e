"""Style mixing: phases stay, low amplitudes are the other image's, draws are private."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mcibi_fast.data import Scenes, StyleMixing, TrainTransform
from mcibi_fast.data.style import mix_amplitude
from mcibi_fast.recipes import AugmentationConfig

pytest.importorskip("torchvision", exc_type=ImportError, reason="needs torchvision")


def images(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (3, height, width)), rng.uniform(0, 255, (3, height, width))


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (64, 20)])
@pytest.mark.parametrize("band", [0.0, 0.1, 0.3])
def test_phase_is_kept_and_low_amplitudes_are_the_others(
    size: tuple[int, int], band: float
) -> None:
    image, other = images(*size)
    mixed = mix_amplitude(image, other, band=band)
    assert mixed.shape == image.shape and mixed.dtype.kind == "f"
    before, style, after = (np.fft.fft2(x) for x in (image, other, mixed))
    turn = np.angle(after * before.conj())
    assert np.abs(turn).max() < 1e-6
    reach = int(band * min(size))
    rows, columns = (np.abs(np.fft.fftfreq(n, 1 / n)) <= reach + 0.5 for n in size)
    low = rows[:, None] & columns
    assert low.sum() == (2 * reach + 1) ** 2
    np.testing.assert_allclose(np.abs(after)[:, low], np.abs(style)[:, low], rtol=1e-8)
    np.testing.assert_allclose(np.abs(after)[:, ~low], np.abs(before)[:, ~low], rtol=1e-6)


def test_a_band_of_nothing_is_the_mean_colour() -> None:
    image, other = images(20, 24)
    mixed = mix_amplitude(image, other, band=0.0)
    np.testing.assert_allclose(mixed.mean((1, 2)), other.mean((1, 2)))
    shift = mixed - image
    np.testing.assert_allclose(shift, shift[:, :1, :1] + 0 * shift, atol=1e-9)


@pytest.fixture
def data() -> Scenes:
    return Scenes("train", count=4, size=(40, 44), seed=0)


def tensor(data: Scenes, index: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data.read(index)[0].transpose(2, 0, 1)))


def test_the_style_is_of_another_image_of_the_split(data: Scenes) -> None:
    mixing = StyleMixing(data, probability=1.0, band=0.0)
    image = tensor(data, 1)
    means = [tensor(data, i).float().mean((1, 2)) for i in range(4)]
    met = set()
    for epoch in range(40):
        mixed = mixing(image, epoch=epoch, index=1)
        assert mixed.dtype == torch.uint8 and mixed.shape == image.shape
        distances = [float((mixed.float().mean((1, 2)) - mean).abs().max()) for mean in means]
        met.add(int(np.argmin(distances)))
    assert met == {0, 2, 3}


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    data = Scenes("train", count=12, size=(40, 44), seed=0)

    def draw(seed: int, epoch: int, index: int) -> bytes:
        mixing = pickle.loads(pickle.dumps(StyleMixing(data, probability=0.5, band=0.1, seed=seed)))
        return mixing(tensor(data, 0), epoch=epoch, index=index).numpy().tobytes()

    results = {(s, e, i): draw(s, e, i) for s in range(2) for e in range(4) for i in range(3)}
    assert all(draw(*key) == value for key, value in results.items())
    plain = tensor(data, 0).numpy().tobytes()
    untouched = sum(value == plain for value in results.values())
    assert 4 <= untouched <= 20 and len(set(results.values())) > 5


def test_the_other_draws_stay_as_they_were(data: Scenes) -> None:
    config = AugmentationConfig(crop_size=(32, 32), scale=(1.0, 1.5))
    plain = config.transform(data, seed=5)
    assert isinstance(plain, TrainTransform) and plain.style is None
    config.style_mixing, config.style_band = 1.0, 0.1
    mixed = config.transform(data, seed=5)
    for index in range(4):
        image, label = tensor(data, index), torch.from_numpy(data.read(index)[1])
        before, after = (t(image, label, epoch=3, index=index) for t in (plain, mixed))
        assert torch.equal(before[1], after[1])  # the same crop and flip
        assert not torch.equal(before[0], after[0])
        assert before[0].shape == after[0].shape and after[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "style_mixing: 1.5 is no probability"),
        ({"probability": 0.5, "band": 0.6}, "style_band: 0.6 is not in 0..0.5"),
    ],
)
def test_options_out_of_range(data: Scenes, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StyleMixing(data, **options)
    alone = Scenes("train", count=1, size=(40, 44), seed=0)
    with pytest.raises(ValueError, match="style_mixing: needs two images or more, there is 1"):
        StyleMixing(alone, probability=0.5)
