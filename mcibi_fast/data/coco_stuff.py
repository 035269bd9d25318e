"""COCO-Stuff 10k v1.1: things and stuff, 182 label ids of which 171 occur."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.archives import Files
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.listed import Item, ListedDataset, read_mat, value_map
from mcibi_fast.viz.palette import distinct_palette

# Ids 1..182: things in COCO's order, then stuff in alphabetical order.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror, dining
table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave,
oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard,
curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile,
floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof,
rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
window-other, wood
"""
_ABSENT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # things that COCO dropped
_PRESENT = [k for k in range(1, 183) if k not in _ABSENT]
_ALL = " ".join(_NAMES.split()).split(", ")
_COMPACT = [_ALL[k - 1] for k in _PRESENT]


class COCOStuff(ListedDataset):
    """The released models' form: an output for each id, class = id - 1; 0 (unlabelled) is ignored.

    Masks are .mat files, key ``S``. Those of v1.0 (1 unlabelled, 2..172 the classes) look alike and
    mean other classes, so they are refused. The palette is not the authors', which came from
    MATLAB's random numbers.
    """

    title = "COCO-Stuff 10k"
    layout = (
        "cocostuff-10k-v1.1.zip, or images/*.jpg, annotations/*.mat, imageLists/{train,test}.txt"
    )
    classes = _ALL
    palette = distinct_palette(182)
    label_map = value_map({k: k - 1 for k in range(1, 183)}, ignored=[0])
    sizes: ClassVar[dict[str, int]] = {"train": 9_000, "test": 1_000}
    checked = ("train", "test")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        images = files.locate("images")
        labels = files.locate("annotations")
        names = files.lines(files.locate(f"imageLists/{split}.txt"))
        return [Item(name, f"{images}/{name}.jpg", f"{labels}/{name}.mat") for name in names]

    @classmethod
    def read_mask(cls, files: Files, path: str) -> NDArray[np.integer]:
        content = read_mat(files, path, "S")
        names = content.get("names")
        if names is not None and names.size == 172:
            raise DataError(
                f"{files.describe(path)}: of COCO-Stuff 10k v1.0 (172 names, 1 is unlabelled), "
                "whose values mean other classes; use cocostuff-10k-v1.1.zip"
            )
        try:
            return content["S"].whole_numbers()
        except ValueError as error:
            raise DataError(f"{files.describe(path)}: {error}; replace it") from error


class COCOStuff171(COCOStuff):
    """The compact form: the 171 ids that occur, in order."""

    title = "COCO-Stuff 10k (171 classes)"
    classes = _COMPACT
    palette = COCOStuff.palette[[k - 1 for k in _PRESENT]]
    label_map = value_map({k: i for i, k in enumerate(_PRESENT)}, ignored=[0])
