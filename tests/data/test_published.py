"""What holds for every published dataset, on small trees in their own layouts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import DATASETS, IMAGENET_MEAN, IMAGENET_STD, DataError, named
from mcibi_fast.data.listed import value_map
from tests.data import trees

CLASSES = {
    "ade20k": (150, "wall", "flag"),
    "lip": (20, "background", "right shoe"),
    "cihp": (20, "background", "right shoe"),
    "cityscapes": (19, "road", "bicycle"),
    "coco_stuff": (182, "person", "wood"),
    "coco_stuff_171": (171, "person", "wood"),
    "pascal_context": (59, "aeroplane", "wood"),
    "pascal_context_60": (60, "background", "wood"),
    "voc": (21, "background", "tvmonitor"),
    "vspw": (124, "wall", "train"),
}


@pytest.fixture(params=list(DATASETS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(name: str, tmp_path: Path) -> Path:
    return trees.WRITERS[name](tmp_path / "data")


def first_file(name: str, root: Path, kind: str) -> Path:
    """The image or mask of the first sample of the first split."""
    cls = DATASETS[name]
    item = cls(root, cls.checked[0]).items[0]
    return root / (item.image if kind == "image" else item.label)


def test_classes_and_colours(name: str) -> None:
    cls = DATASETS[name]
    count, first, last = CLASSES[name]
    assert len(cls.classes) == len(set(cls.classes)) == count
    assert (cls.classes[0], cls.classes[-1]) == (first, last)
    assert cls.palette.shape == (count, 3) and cls.palette.dtype == np.uint8
    assert named(name) is cls


def test_samples_of_every_split(name: str, root: Path) -> None:
    cls = DATASETS[name]
    for split in cls.checked:
        dataset = cls(root, split)
        assert (dataset.mean, dataset.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert dataset.num_classes == len(cls.classes)
        names = [dataset.name(i) for i in range(len(dataset))]
        assert names and len(set(names)) == len(names)
        for i in range(len(dataset)):
            image, label = dataset.read(i)
            assert image.shape == (*trees.SIZE, 3) and image.dtype == np.uint8
            assert label.shape == trees.SIZE and label.dtype == np.uint8
            assert label[label != 255].max() < dataset.num_classes
        assert dataset[0]["image"].shape == (3, *trees.SIZE)


@pytest.mark.parametrize("below", ["", "download/"])
def test_zip_files_give_what_the_folder_gives(
    name: str, root: Path, tmp_path: Path, below: str
) -> None:
    cls = DATASETS[name]
    archive = trees.pack(root, tmp_path / "packed.zip", within=below)
    for split in cls.checked:
        unpacked, zipped = cls(root, split), pickle.loads(pickle.dumps(cls(archive, split)))
        assert len(unpacked) == len(zipped)
        for i in range(len(unpacked)):
            assert unpacked.name(i) == zipped.name(i)
            for a, b in zip(unpacked.read(i), zipped.read(i), strict=True):
                assert np.array_equal(a, b)


def test_a_submission_goes_back_to_the_masks_values(name: str) -> None:
    cls = DATASETS[name]
    label = np.arange(len(cls.classes)).reshape(1, -1)
    values = cls.to_submission(label)
    assert values.dtype == np.uint8
    assert np.array_equal(cls.classes_of(values, "round trip"), label)
    for bad in (-1, len(cls.classes), 255):
        with pytest.raises(ValueError, match=f"label: {bad} is no class of"):
            cls.to_submission(np.array([[bad]]))


def test_missing_files_are_found_at_once(name: str, root: Path) -> None:
    cls = DATASETS[name]
    for kind in ("mask", "image"):
        path = first_file(name, root, kind)
        content = path.read_bytes()
        path.unlink()
        if name == "voc" and kind == "mask":  # SBD may have one, too
            for other in root.rglob(f"{path.stem}.mat"):
                other.unlink()
        with pytest.raises(DataError) as error:
            cls(root, cls.checked[0])
        assert str(error.value).startswith(f"{path.relative_to(root).as_posix()}: missing; unpack")
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("content", [b"", b"not what it should be"])
def test_files_that_are_not_whole(name: str, root: Path, kind: str, content: bytes) -> None:
    cls = DATASETS[name]
    path = first_file(name, root, kind)
    path.write_bytes(content)
    reason = "cannot be decoded|not a whole .mat file" if content else r"empty \(0 bytes\)"
    with pytest.raises(DataError, match=reason) as error:
        cls(root, cls.checked[0]).read(0)
    message = str(error.value)
    assert message.startswith(path.relative_to(root).as_posix())
    assert "\n" not in message and "object at" not in message


def test_a_value_that_the_dataset_does_not_have(name: str, root: Path) -> None:
    cls = DATASETS[name]
    if name == "vspw":
        pytest.skip("VSPW's masks are known to hold other values; tests/data/test_vspw.py")
    unknown = np.flatnonzero(cls.label_map == 254)[:-2].max()  # not 253 and 254 themselves
    path = first_file(name, root, "mask")
    mask = np.zeros(trees.SIZE, np.uint8)
    mask[3, 4] = unknown
    if path.suffix == ".mat":
        trees.write_mat(path, S=mask)
    else:
        Image.fromarray(mask).save(path)
    with pytest.raises(DataError) as error:
        cls(root, cls.checked[0]).read(0)
    message = str(error.value)
    assert message.startswith(f"{path.relative_to(root).as_posix()}: value {unknown}; the masks of")
    assert "255; unpack it again" in message and "\n" not in message


def test_masks_in_colour_and_of_another_size(name: str, root: Path) -> None:
    cls = DATASETS[name]
    path = first_file(name, root, "mask")
    if path.suffix != ".mat":
        Image.new("RGB", trees.SIZE[::-1]).save(path)
        with pytest.raises(DataError, match=r"a colour mask \(RGB\)"):
            cls(root, cls.checked[0]).read(0)
    image = first_file(name, root, "image")
    trees.write_image(image, size=(5, 7))
    if path.suffix != ".mat":
        Image.new("L", trees.SIZE[::-1], 7).save(path)
    with pytest.raises(DataError, match=r"size 18x12 but .+ has 7x5"):
        cls(root, cls.checked[0]).read(0)


def test_what_is_not_there(name: str, root: Path, tmp_path: Path) -> None:
    cls = DATASETS[name]
    with pytest.raises(DataError, match="no split 'other'; there is train"):
        cls(root, "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="in it; expected ") as error:
        cls(tmp_path / "empty", cls.checked[0])
    assert cls.layout in str(error.value)
    with pytest.raises(DataError, match="no such folder or zip file"):
        cls(tmp_path / "nothing", cls.checked[0])


def test_names_of_datasets() -> None:
    with pytest.raises(ValueError, match="no dataset 'ade'; there are ade20k, lip"):
        named("ade")


def test_value_map() -> None:
    table = value_map({7: 0, 8: 1}, ignored=[0])
    assert table.dtype == np.uint8
    assert table[[0, 7, 8, 255]].tolist() == [255, 0, 1, 255]
    assert (np.delete(table, [0, 7, 8, 255]) == 254).all()
