"""LIP and CIHP, human parsing: 20 classes with the background."""

from __future__ import annotations

from typing import ClassVar

from mcibi_fast.data.archives import Files
from mcibi_fast.data.listed import Item, ListedDataset, colours, value_map

_NAMES = (
    "background, hat, hair, glove, sunglasses, upper clothes, dress, coat, socks, pants, "
    "{tenth}, scarf, skirt, face, left arm, right arm, left leg, right leg, left shoe, right shoe"
)
# The usual colours for both datasets.
_COLOURS = """
000000 800000 ff0000 005500 aa0033 ff5500 000055 0077dd 555500 005555 553300 345680 008000 0000ff
33aadd 00ffff 55ffaa aaff55 ffff00 ffaa00
"""
_LEFT_RIGHT = ((14, 15), (16, 17), (18, 19))


class LIP(ListedDataset):
    """Single persons. A mirrored image swaps left and right: ``flip_pairs``."""

    title = "LIP"
    layout = "{train,val}_images/*.jpg, {train,val}_segmentations/*.png, {train,val}_id.txt"
    classes = _NAMES.format(tenth="jumpsuits").split(", ")
    palette = colours(_COLOURS)
    label_map = value_map({k: k for k in range(20)})
    flip_pairs = _LEFT_RIGHT
    sizes: ClassVar[dict[str, int]] = {"train": 30_462, "val": 10_000}
    checked = ("train", "val")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        images = files.locate(f"{split}_images")
        labels = files.locate(f"{split}_segmentations")
        names = files.lines(files.locate(f"{split}_id.txt"))
        return [Item(name, f"{images}/{name}.jpg", f"{labels}/{name}.png") for name in names]


class CIHP(ListedDataset):
    """Several persons per image. Class 10 is torso skin; in LIP it is jumpsuits."""

    title = "CIHP"
    layout = "{Training,Validation}/{Images,Category_ids}, {Training/train,Validation/val}_id.txt"
    classes = _NAMES.format(tenth="torso skin").split(", ")
    palette = colours(_COLOURS)
    label_map = value_map({k: k for k in range(20)})
    flip_pairs = _LEFT_RIGHT
    sizes: ClassVar[dict[str, int]] = {"train": 28_280, "val": 5_000}
    checked = ("train", "val")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        part = {"train": "Training", "val": "Validation"}[split]
        images = files.locate(f"{part}/Images")
        labels = files.locate(f"{part}/Category_ids")
        # Files have seven digits, whether the list writes the leading zeros or not.
        names = [n.zfill(7) for n in files.lines(files.locate(f"{part}/{split}_id.txt"))]
        return [Item(name, f"{images}/{name}.jpg", f"{labels}/{name}.png") for name in names]
