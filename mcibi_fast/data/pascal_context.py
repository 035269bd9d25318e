"""PASCAL-Context: 59 classes, or 60 with the background, on the images of VOC 2010."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mcibi_fast.data.archives import Files
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import check_pixels
from mcibi_fast.data.listed import Item, ListedDataset, value_map
from mcibi_fast.data.reading import check_name, read_regular
from mcibi_fast.data.run_lengths import decode_runs
from mcibi_fast.files import new_file, write_atomically
from mcibi_fast.progress import track
from mcibi_fast.untrusted import parse_json, shorten
from mcibi_fast.viz.palette import distinct_palette

# In the order of their ids among the 459 labels, which is alphabetical. A mask holds positions in
# this list, from 1.
_NAMES = """
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet,
car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower,
food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform,
pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train,
tree, truck, tvmonitor, wall, water, window, wood
"""
_WITH_BACKGROUND = ["background", *" ".join(_NAMES.split()).split(", ")]
# The ids; 0, the background, is all the rest.
_IDS = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
_CONVERT = "make them with mcibi-fast data convert pascal_context ROOT"


class PascalContext(ListedDataset):
    """59 classes: a mask holds 0 for the background, which is ignored, and k for class k - 1.

    `convert` makes the masks and the lists from trainval_merged.json. The palette is ours.
    """

    title = "PASCAL-Context"
    layout = (
        "VOC2010/JPEGImages, VOC2010/SegmentationClassContext and "
        f"VOC2010/ImageSets/SegmentationContext ({_CONVERT})"
    )
    classes = _WITH_BACKGROUND[1:]
    palette = distinct_palette(59)
    label_map = value_map({k: k - 1 for k in range(1, 60)}, ignored=[0])
    sizes: ClassVar[dict[str, int]] = {"train": 4_998, "val": 5_105}
    checked = ("train", "val")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        lists = files.locate(f"ImageSets/SegmentationContext/{split}.txt")
        labels = files.locate("SegmentationClassContext")
        images = files.locate("VOC2010/JPEGImages", "JPEGImages")
        return [
            Item(name, f"{images}/{name}.jpg", f"{labels}/{name}.png")
            for name in files.lines(lists)
        ]


class PascalContext60(PascalContext):
    """60 classes: the background is class 0."""

    title = "PASCAL-Context (60 classes)"
    classes = _WITH_BACKGROUND
    palette = np.concatenate([np.zeros((1, 3), np.uint8), PascalContext.palette])
    label_map = value_map({k: k for k in range(60)})


def convert(
    root: str | Path, annotations: str | Path | None = None, *, progress: bool = False
) -> dict[str, int]:
    """Writes SegmentationClassContext/*.png and ImageSets/SegmentationContext/*.txt.

    Args:
        root: VOC2010, or the folder that holds it.
        annotations: trainval_merged.json; default the one in either.
        progress: show how far it is.

    Returns:
        The number of images of each split.

    Raises:
        DataError: a folder or the file is missing, or the file is not what it should be.
    """
    files = Files(root, "VOC2010 with JPEGImages, and trainval_merged.json")
    home = Path(root) / Path(files.locate("VOC2010/JPEGImages", "JPEGImages")).parent
    source = Path(annotations or Path(root) / files.locate("trainval_merged.json"))
    try:
        content = parse_json(read_regular(source, str(source), "MAX_ANNOTATION_BYTES"))
        regions = defaultdict(list)
        for region in content["annos_segmentation"]:
            regions[region["image_id"]].append(region)
        lists: dict[str, list[str]] = {"train": [], "val": []}
        (home / "SegmentationClassContext").mkdir(exist_ok=True)
        for image in track(content["images"], "convert", unit="image", show=progress, leave=True):
            name = Path(image["file_name"]).stem
            check_name(name, str(source))
            shown = f"{source}: image {shorten(str(image['image_id']))}"
            mask = _draw(image, regions[image["image_id"]], shown)
            with new_file(home / "SegmentationClassContext" / f"{name}.png", sync=False) as file:
                Image.fromarray(mask).save(file, "PNG")
            lists[image["phase"]].append(name)
    except OSError as error:
        raise DataError(f"{error.filename or source}: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = shorten(f"{type(error).__name__}: {error}")
        raise DataError(f"{source}: not PASCAL-Context's annotations ({reason})") from error
    (home / "ImageSets" / "SegmentationContext").mkdir(parents=True, exist_ok=True)
    for split, names in lists.items():
        path = home / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        lines = "".join(f"{name}\n" for name in sorted(names))
        write_atomically(path, lines.encode("utf-8", "surrogateescape"))
    return {split: len(names) for split, names in lists.items()}


def _draw(image: dict[str, Any], regions: list[dict[str, Any]], name: str) -> NDArray[np.uint8]:
    """The ranks (H, W) of the regions' ids; other ids and empty pixels are background."""
    size = (image["height"], image["width"])
    if not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"{name}: has no size")
    # Each region is drawn over the whole image.
    check_pixels(size[1], size[0] * max(len(regions), 1), name)
    mask = np.zeros(size, np.uint8)
    for region in regions:
        if list(region["segmentation"]["size"]) != list(size):
            raise DataError(f"{name}: a region of another size")
        rank = _IDS.index(region["category_id"]) if region["category_id"] in _IDS else 0
        mask[decode_runs(region["segmentation"]["counts"], size)] = rank
    return mask
