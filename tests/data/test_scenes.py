from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch.utils.data import DataLoader

from mcibi_fast.data import IGNORE_INDEX, Scenes
from mcibi_fast.data.synthetic import scenes as module
from mcibi_fast.data.synthetic.canvas import Canvas, Window, box, ellipse, polygon
from mcibi_fast.data.synthetic.scenes import LOOK_ALIKES, PRESENCE, SCENE_TYPES, SCENES_CLASSES


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(type, image, label) of 400 scenes."""
    dataset = Scenes("train", count=400, size=64, seed=7)
    return [(dataset.scene_type(i), *dataset.read(i)) for i in range(len(dataset))]


def classes_in(label: np.ndarray) -> set[int]:
    return {int(c) for c in np.unique(label)} - {IGNORE_INDEX}


def test_sample_has_the_interface():
    dataset = Scenes("val", count=3, size=(40, 56), seed=0)
    sample = dataset[2]
    assert sample["image"].shape == (3, 40, 56)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].shape == (40, 56)
    assert sample["label"].dtype == torch.uint8
    assert sample["name"] == "val_00002"
    assert len(dataset) == 3
    assert dataset.num_classes == len(dataset.classes) == len(dataset.palette) == 12
    assert len({tuple(c) for c in dataset.palette.tolist()}) == 12
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize("size", [(16, 16), (17, 61), (61, 17), (96, 96), (200, 333)])
def test_every_size_is_drawn_and_labelled(size):
    dataset = Scenes("train", count=12, size=size, seed=1)
    for i in range(len(dataset)):
        image, label = dataset.read(i)
        assert image.shape == (*size, 3)
        assert image.dtype == label.dtype == np.uint8
        assert label[label != IGNORE_INDEX].max() < 12
        assert 0 < (label != IGNORE_INDEX).mean() <= 1
        assert (label == IGNORE_INDEX).mean() < 0.25, "the unlabelled line is thin"


def test_an_image_depends_on_seed_split_and_index_alone():
    dataset = Scenes("train", count=20, size=48, seed=3)
    forwards = [dataset.read(i) for i in range(20)]
    for i in reversed(range(20)):
        again = Scenes("train", count=999, size=48, seed=3).read(i)
        assert np.array_equal(forwards[i][0], again[0])
        assert np.array_equal(forwards[i][1], again[1])
    images = [image.tobytes() for image, _ in forwards]
    images += [Scenes("val", count=20, size=48, seed=3).read(i)[0].tobytes() for i in range(20)]
    images += [Scenes("train", count=20, size=48, seed=4).read(i)[0].tobytes() for i in range(20)]
    assert len(set(images)) == 60


def test_workers_change_nothing():
    dataset = Scenes("train", count=8, size=32, seed=0)
    alone = next(iter(DataLoader(dataset, batch_size=8)))
    worked = list(DataLoader(dataset, batch_size=2, num_workers=2))
    assert torch.equal(alone["image"], torch.cat([batch["image"] for batch in worked]))
    assert torch.equal(alone["label"], torch.cat([batch["label"] for batch in worked]))


def test_normalised_images_have_mean_0_and_std_1():
    dataset = Scenes("train", count=300, size=32, seed=11)
    pixels = torch.stack([dataset[i]["image"] for i in range(300)]).transpose(0, 1).flatten(1)
    assert pixels.mean(1).abs().max() < 0.1
    assert (pixels.std(1) - 1).abs().max() < 0.1


@pytest.mark.parametrize("kind", SCENE_TYPES)
def test_classes_appear_as_often_as_the_table_says(drawn, kind):
    labels = [classes_in(label) for type_, _, label in drawn if type_ == kind]
    for c, probability in enumerate(PRESENCE[kind]):
        share = np.mean([c in found for found in labels])
        if probability in (0, 1):
            assert share == probability, SCENES_CLASSES[c]
        else:
            spread = (probability * (1 - probability) / len(labels)) ** 0.5
            assert abs(share - probability) < 3.5 * spread + 0.03, SCENES_CLASSES[c]


def test_context_decides_every_look_alike(drawn):
    """What makes the ambiguity one that context resolves: a tell-tale in each image."""
    ids = {name: i for i, name in enumerate(SCENES_CLASSES)}
    for kind, _, label in drawn:
        found = classes_in(label)
        assert not {ids["sand"], ids["field"]} <= found
        assert not {ids["rock"], ids["bale"]} <= found
        assert not {ids["boat"], ids["car"]} <= found
        if kind == "coast":
            assert ids["boat"] in found
        if kind == "farm":
            assert found & {ids["tree"], ids["building"]}


def test_a_coast_from_above_is_drawn_as_a_farm_is():
    def background(air: int, earth: int) -> tuple[np.ndarray, np.ndarray]:
        scene = module._Scene(np.random.default_rng(5), Canvas(48, 48), "farm")
        module._air_over_earth(scene, air, earth)
        return scene.finish(), scene.canvas.label

    farm = background(module.SKY, module.FIELD)
    coast = background(module.WATER, module.SAND)
    assert np.array_equal(farm[0], coast[0])
    assert not np.array_equal(farm[1], coast[1])
    assert np.array_equal(farm[1] == IGNORE_INDEX, coast[1] == IGNORE_INDEX)


def colours_of(drawn, c: int) -> np.ndarray:
    """Histogram of a class's colours in 4x4x4 bins, every image weighted alike."""
    total = np.zeros(64)
    for _, image, label in drawn:
        pixels = image[label == c] // 64
        if len(pixels) >= 20:
            total += np.bincount(pixels @ np.array([16, 4, 1]), minlength=64) / len(pixels)
    return total / total.sum()


@pytest.mark.parametrize("pair", LOOK_ALIKES, ids=lambda p: "-".join(SCENES_CLASSES[c] for c in p))
def test_look_alikes_share_their_colours(drawn, pair):
    first, second = (colours_of(drawn, c) for c in pair)
    difference = 0.5 * np.abs(first - second).sum()  # total variation, 0..1
    others = [0.5 * np.abs(first - colours_of(drawn, c)).sum() for c in range(12) if c not in pair]
    assert difference < 0.3
    assert difference < min(others)


def patches(drawn, pair: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """9x9 patches wholly of one class: features, which class, which image."""
    features, which, source = [], [], []
    for number, (_, image, label) in enumerate(drawn):
        for side, c in enumerate(pair):
            rows, columns = np.nonzero(label == c)
            for k in rng.permutation(len(rows))[:12]:
                i, j = rows[k], columns[k]
                window = np.s_[i - 4 : i + 5, j - 4 : j + 5]
                if min(i, j) >= 4 and label[window].shape == (9, 9) and (label[window] == c).all():
                    patch = image[window].astype(float)
                    flat = patch.reshape(-1, 3)
                    slope = patch[-1].mean(0) - patch[0].mean(0)
                    features.append([*flat.mean(0), *flat.std(0), *slope])
                    which.append(side)
                    source.append(number)
    return np.array(features), np.array(which), np.array(source)


@pytest.mark.parametrize(
    ("names", "local"),
    [(("sky", "water"), False), (("sand", "field"), False), (("sand", "road"), True)],
    ids=str,
)
def test_a_patch_alone_does_not_tell_look_alikes_apart(drawn, names, local):
    """A random forest on the colour, contrast and gradient of patches, tested on other images."""
    pair = tuple(SCENES_CLASSES.index(name) for name in names)
    features, which, source = patches(drawn, pair, np.random.default_rng(0))
    train = source < len(drawn) // 2
    forest = RandomForestClassifier(60, min_samples_leaf=5, class_weight="balanced", random_state=0)
    right = forest.fit(features[train], which[train]).predict(features[~train]) == which[~train]
    accuracy = np.mean([right[which[~train] == side].mean() for side in (0, 1)])
    assert accuracy > 0.9 if local else accuracy < 0.65


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split: 'dev' is not one of train, val, test"),
        ({"count": 0}, "count: 0 images"),
        ({"size": 8}, "size: 8x8 is too small"),
        ({"seed": -1}, "seed: -1 is negative"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"split": "train", "count": 1, "size": 32, "seed": 0}
    with pytest.raises(ValueError, match=message):
        Scenes(**{**good, **arguments})


@pytest.fixture
def window() -> Window:
    found = Canvas(100, 100).window(0, 0, 1, 1)
    assert found is not None
    return found


def test_shapes_cover_their_area(window):
    square = [(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7)]
    areas = {
        "ellipse": (ellipse(window, 0.5, 0.5, 0.3, 0.2), np.pi * 0.3 * 0.2),
        "box": (box(window, 0.5, 0.5, 0.3, 0.2), 0.24),
        "round box": (box(window, 0.5, 0.5, 0.3, 0.2, r=0.1), 0.24 - (4 - np.pi) * 0.01),
        "polygon": (polygon(window, square), 0.16),
    }
    for name, (distance, area) in areas.items():
        covered = window.coverage(distance)
        assert covered.mean() == pytest.approx(area, abs=1e-3), name
        assert ((covered > 0) & (covered < 1)).any(), f"{name} has no smooth edge"


@pytest.mark.slow
def test_import_needs_neither_timm_nor_torchvision():
    code = (
        "import sys; sys.modules['timm'] = sys.modules['torchvision'] = None\n"
        "from mcibi_fast import data\n"
        "data.Scenes('train', count=1, size=32, seed=0)[0]\n"
        "data.EvalTransform(mean=(0, 0, 0), std=(1, 1, 1))\n"
        "try:\n"
        "    data.TrainTransform(32, mean=(0, 0, 0), std=(1, 1, 1))\n"
        "except ImportError as error:\n"
        "    assert 'needs torchvision' in str(error), error\n"
        "else:\n"
        "    sys.exit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
