"""Cityscapes, 19 of its 34 labels."""

from __future__ import annotations

from typing import ClassVar

from mcibi_fast.data.archives import Files
from mcibi_fast.data.listed import Item, ListedDataset, colours, value_map

_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
# Label id of each class, in order.
_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
_NAMES = """
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
sky, person, rider, car, truck, bus, train, motorcycle, bicycle
"""
_COLOURS = """
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e
000046 003c64 005064 0000e6 770b20
"""


class Cityscapes(ListedDataset):
    """Masks are ``*_gtFine_labelIds.png``; `to_submission` goes back to label ids.

    Splits: train, val, trainval, and test, whose masks are blank. Reads the two _trainvaltest.zip
    files (leftImg8bit and gtFine) in place: the root is the folder that holds both.
    """

    title = "Cityscapes"
    layout = (
        "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png, "
        "or the two _trainvaltest.zip files"
    )
    classes = " ".join(_NAMES.split()).split(", ")
    palette = colours(_COLOURS)
    label_map = value_map(
        {value: k for k, value in enumerate(_IDS)}, ignored=sorted(set(range(34)) - set(_IDS))
    )
    sizes: ClassVar[dict[str, int]] = {"train": 2_975, "val": 500, "trainval": 3_475, "test": 1_525}
    checked = ("train", "val")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        if split == "trainval":
            return cls.listing(files, "train") + cls.listing(files, "val")
        images = files.locate(f"leftImg8bit/{split}")
        labels = files.locate(f"gtFine/{split}")
        # The names of both, so that a missing mask is noticed as well as a missing image.
        names = _names(files, images, _IMAGE) | _names(files, labels, _MASK)
        return [
            Item(name, f"{images}/{city}/{name}{_IMAGE}", f"{labels}/{city}/{name}{_MASK}")
            for city, name in sorted(names)
        ]


def _names(files: Files, folder: str, ending: str) -> set[tuple[str, str]]:
    """(city, name) of the files below ``folder`` whose names end in ``ending``."""
    return {
        (city, name.removesuffix(ending))
        for city in files.names(folder)
        for name in files.names(f"{folder}/{city}")
        if name.endswith(ending)
    }
