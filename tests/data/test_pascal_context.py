from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import DataError, PascalContext, PascalContext60
from mcibi_fast.data.pascal_context import convert
from tests.data import trees

HEIGHT, WIDTH = trees.SIZE
# Ids among the 459 labels, by their places in the published list.
IDS = {"aeroplane": 2, "bag": 9, "mouse": 260, "person": 284, "table": 397, "wood": 458}


def encode_runs(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def encode_text(runs: list[int]) -> str:
    """COCO's: differences to the run two before from the fourth on, in five bits, signed."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            text += chr(48 + (bits if done else bits | 32))
            if done:
                break
    return text


def regions(image: int, parts: dict[int, np.ndarray], *, as_text: bool) -> list[dict]:
    return [
        {
            "image_id": image,
            "category_id": label,
            "segmentation": {
                "size": list(mask.shape),
                "counts": encode_text(encode_runs(mask)) if as_text else encode_runs(mask),
            },
        }
        for label, mask in parts.items()
    ]


@pytest.fixture
def voc2010(tmp_path: Path) -> Path:
    """VOCdevkit with VOC2010 and VOC2012; train has three images, val one; 100 is no class."""
    for year in ("VOC2010", "VOC2012"):
        for name in ("2008_000002", "2008_000003", "2008_000007", "2008_000009"):
            trees.write_image(tmp_path / year / "JPEGImages" / f"{name}.jpg")
    rng = np.random.default_rng(0)
    content: dict[str, list] = {"images": [], "annos_segmentation": []}
    for i, name in enumerate(["2008_000007", "2008_000002", "2008_000003", "2008_000009"]):
        image = {"image_id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
        content["images"].append(image | {"phase": "train" if i else "val"})
        labels = rng.choice([0, 100, *IDS.values()], trees.SIZE)
        np.save(tmp_path / f"{name}.npy", labels)
        parts = {k: labels == k for k in (100, *IDS.values())}
        content["annos_segmentation"] += regions(i, parts, as_text=i % 2 == 0)
    (tmp_path / "VOC2010" / "trainval_merged.json").write_text(json.dumps(content))
    return tmp_path


def test_a_class_is_the_rank_of_its_id(voc2010: Path) -> None:
    assert convert(voc2010) == {"train": 3, "val": 1}
    dataset, full = PascalContext(voc2010, "train"), PascalContext60(voc2010, "train")
    assert [dataset.name(i) for i in range(3)] == ["2008_000002", "2008_000003", "2008_000009"]
    assert "VOC2010" in dataset.items[0].image
    for i in range(3):
        labels = np.load(voc2010 / f"{dataset.name(i)}.npy")
        label, with_background = dataset.read(i)[1], full.read(i)[1]
        for name, value in IDS.items():
            assert {PascalContext.classes[c] for c in label[labels == value]} == {name}
            assert {PascalContext60.classes[c] for c in with_background[labels == value]} == {name}
        rest = np.isin(labels, [0, 100])
        assert (label[rest] == 255).all()
        assert (with_background[rest] == 0).all()


def test_names_are_in_the_order_of_the_ids_and_not_of_voc() -> None:
    """A common list begins with VOC's twenty; its names do not belong to these masks."""
    assert PascalContext.classes == sorted(PascalContext.classes)
    assert PascalContext60.classes == ["background", *PascalContext.classes]


@pytest.mark.parametrize(
    "runs", [[0, 216], [216], [3, 1, 4, 100, 5, 60, 43], [215, 1], [7, 200, 9]]
)
def test_runs_as_text(voc2010: Path, runs: list[int]) -> None:
    source = voc2010 / "VOC2010" / "trainval_merged.json"
    image = {"image_id": 1, "file_name": "2008_000002.jpg", "height": 12, "width": 18}
    masks = []
    for counts in (runs, encode_text(runs)):
        region = {
            "image_id": 1,
            "category_id": 2,
            "segmentation": {"size": [12, 18], "counts": counts},
        }
        content = {"images": [image | {"phase": "val"}], "annos_segmentation": [region]}
        source.write_text(json.dumps(content))
        convert(voc2010)
        path = voc2010 / "VOC2010" / "SegmentationClassContext" / "2008_000002.png"
        masks.append(np.array(Image.open(path)))
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    assert np.array_equal(masks[0], flat.reshape(18, 12).T)
    assert np.array_equal(masks[0], masks[1])


def test_runs_as_text_by_a_known_answer() -> None:
    """Worked out by hand: 20, 40, 3, then 70 - 40 = 30 and 9 - 3 = 6."""
    assert encode_text([20, 40, 3, 70, 9]) == "d0X13n06"


def test_before_the_masks_are_made(voc2010: Path) -> None:
    with pytest.raises(DataError, match="mcibi-fast data convert pascal_context ROOT"):
        PascalContext(voc2010, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"trainval_merged\.json: not PASCAL-Context's annotations"),
        ("{}", r"trainval_merged\.json: not PASCAL-Context's annotations"),
        (None, r"no trainval_merged\.json in it"),
    ],
)
def test_annotations_that_cannot_be_used(voc2010: Path, content: str | None, message: str) -> None:
    source = voc2010 / "VOC2010" / "trainval_merged.json"
    if content is None:
        source.unlink()
    else:
        source.write_text(content)
    with pytest.raises(DataError, match=message):
        convert(voc2010)
