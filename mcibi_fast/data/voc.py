"""PASCAL VOC 2012 with the masks of SBD, 20 classes and the background."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.archives import Files
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.listed import Item, ListedDataset, read_mat, value_map
from mcibi_fast.viz.palette import voc_palette

_NAMES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, "
    "dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)


class VOC(ListedDataset):
    """Masks are palette PNGs of 0..20, and 255 around objects.

    The split trainaug is VOC's train and SBD's train and val, without VOC's val. The mask of each
    image is the first that exists in SegmentationClass (VOC's own), SegmentationClassAug, and SBD's
    ``dataset/cls/*.mat``, which are read directly. Without SBD's lists trainaug is taken from
    ImageSets/Segmentation/trainaug.txt.
    """

    title = "VOC 2012"
    layout = (
        "VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}, and for trainaug SBD's "
        "dataset/{cls,train.txt,val.txt} beside it, or SegmentationClassAug with trainaug.txt"
    )
    classes = _NAMES.split(", ")
    palette = voc_palette(21)
    label_map = value_map({k: k for k in range(21)})
    sizes: ClassVar[dict[str, int]] = {"train": 1_464, "val": 1_449, "trainaug": 10_582}
    checked = ("trainaug", "val")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        images = files.locate("VOC2012/JPEGImages", "JPEGImages")
        home = images.removesuffix("JPEGImages")
        boundaries = files.find("dataset/cls")
        masks: dict[str, str] = {}
        for folder in (f"{home}SegmentationClass", f"{home}SegmentationClassAug", boundaries):
            for file in files.names(folder) if folder else ():
                masks.setdefault(file.rsplit(".", 1)[0], f"{folder}/{file}")
        return [
            Item(
                name, f"{images}/{name}.jpg", masks.get(name, f"{home}SegmentationClass/{name}.png")
            )
            for name in _names(files, split, f"{home}ImageSets/Segmentation", boundaries)
        ]

    @classmethod
    def read_mask(cls, files: Files, path: str) -> NDArray[np.integer]:
        if not path.endswith(".mat"):
            return super().read_mask(files, path)
        content = read_mat(files, path, "GTcls")
        try:
            return content["GTcls"].field("Segmentation").whole_numbers()
        except ValueError as error:
            raise DataError(
                f"{files.describe(path)}: no GTcls.Segmentation in it; take SBD's dataset/cls"
            ) from error


def _names(files: Files, split: str, lists: str, boundaries: str | None) -> list[str]:
    """The names of ``split``; ``boundaries`` is SBD's folder of masks, beside its lists."""
    if split != "trainaug":
        return files.lines(f"{lists}/{split}.txt")
    if boundaries is None:
        named = files.lines(f"{lists}/trainaug.txt")
    else:
        home = boundaries.removesuffix("cls")
        named = files.lines(f"{lists}/train.txt")
        named += files.lines(f"{home}train.txt") + files.lines(f"{home}val.txt")
    return sorted(set(named) - set(files.lines(f"{lists}/val.txt")))
