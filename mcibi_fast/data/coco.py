"""Annotations of objects in COCO's JSON as masks of classes: polygons, run lengths, crowds.

ROOT/annotations/instances_<split>.json   or one of the other places in `ANNOTATIONS`
ROOT/<split>/<file_name>                  or one of the other places in `IMAGES`

The classes are "background" (0) and then the file's categories in the order of their ids. Objects
overlap: they are painted from the largest area to the smallest, so the smaller one is on top; of
two with one area, the later one in the file. A crowd (``iscrowd``) is a region that is not outlined
object by object: it is ignored (255), and lies below all objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.data.images import fit, read_colours
from mcibi_fast.data.reading import check_class_names, check_name, read_regular
from mcibi_fast.data.run_lengths import decode_runs
from mcibi_fast.errors import and_more
from mcibi_fast.extras import load
from mcibi_fast.limits import check_limit
from mcibi_fast.untrusted import parse_json, shorten
from mcibi_fast.viz.palette import distinct_palette

ANNOTATIONS = (
    "annotations/instances_{split}.json",
    "annotations/{split}.json",
    "{split}/_annotations.coco.json",
    "{split}.json",
)
IMAGES = ("{split}", "images/{split}", "images", ".")
BACKGROUND = "background"

Crowd = Literal["ignore", "class"]


class CocoImage(NamedTuple):
    """An entry of ``images``."""

    id: int
    file_name: str
    height: int
    width: int


class CocoObject(NamedTuple):
    """An entry of ``annotations``: its id, class, and outline as polygons or a run-length code."""

    id: Any
    category: int  # its place among the categories
    crowd: bool
    outline: list[list[float]] | dict[str, Any]


class CocoFile(NamedTuple):
    """A file of annotations."""

    name: str
    classes: list[str]
    images: list[CocoImage]
    objects: dict[int, list[CocoObject]]  # by the image's id


class CocoDataset(SegmentationDataset):
    """Objects in COCO's JSON as masks of classes; see this module's docstring.

    Args:
        root: the folder.
        split: names the file of annotations and the folder of images, such as "train2017".
        transform: see `data.transforms`; None only normalises.
        annotations: the file, relative to ``root``, with {split} for the split; None looks in
            `ANNOTATIONS`.
        images: the folder of images, likewise; None takes the first of `IMAGES` that has the first
            image.
        background: pixels without an object are class 0; if False they are ignored, and the
            classes are the categories alone.
        crowd: "ignore", or "class" to paint a crowd as an object of its category.

    Images without annotations are kept: all of their pixels are background (or ignored).
    ``dataset[i]`` is as for `FolderDataset`. Raises DataError, naming the file and the annotation:
    at once for what is wrong in the JSON, and when a sample is read for an image that is missing,
    cannot be decoded or has another size than the file says, and for an outline that is none.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        *,
        annotations: str | None = None,
        images: str | None = None,
        background: bool = True,
        crowd: Crowd = "ignore",
    ) -> None:
        load("COCO's annotations", "pycocotools.mask")
        super().__init__(transform)
        self.root, self.split, self.background, self.crowd = Path(root), split, background, crowd
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder")
        name = annotations.replace("{split}", split) if annotations else _found(self.root, split)
        check_name(name, "annotations")
        self.file = read_coco(self.root / name, name)
        names = [BACKGROUND, *self.file.classes] if background else self.file.classes
        check_class_names(names, name)
        self.classes, self.palette = names, distinct_palette(len(names))
        if background:
            self.palette[0] = 0
        if not self.file.images:
            raise DataError(f"{name}: lists no images")
        if images is not None:
            images = images.replace("{split}", split)
            check_name(images, "images")
        self.folder = images if images is not None else self._folder()
        paths = [f"{self.folder}/{image.file_name}" for image in self.file.images]
        missing = [path for path in paths if not (self.root / path).is_file()]
        if missing:
            more = and_more(len(missing))
            raise DataError(f"{missing[0]}: missing{more}, but {name} lists it")

    def _folder(self) -> str:
        first = self.file.images[0].file_name
        for place in IMAGES:
            folder = place.format(split=self.split)
            if (self.root / folder / first).is_file():
                return folder
        places = ", ".join(place.format(split=self.split) for place in IMAGES)
        raise DataError(f"{self.root}: no {first} in it; looked in {places}")

    def __len__(self) -> int:
        return len(self.file.images)

    def name(self, index: int) -> str:
        return str(Path(self.file.images[index].file_name).with_suffix(""))

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        entry = self.file.images[index]
        name = f"{self.folder}/{entry.file_name}"
        decoded = read_colours(self.root / name, name, self.notes)
        label = self.mask(entry)
        return fit(decoded, label, name, self.file.name, self.notes), label

    def mask(self, entry: CocoImage) -> NDArray[np.uint8]:
        """The classes (H, W) of an image's pixels. Raises DataError for an outline that is none."""
        codes: Any = load("COCO's annotations", "pycocotools.mask")
        check_limit(
            "MAX_PIXELS",
            entry.height * entry.width,
            f"{self.file.name}: image {entry.file_name}: {entry.width}x{entry.height}",
            DataError,
        )
        nothing = 0 if self.background else IGNORE_INDEX
        label = np.full((entry.height, entry.width), nothing, np.uint8)
        painted = []
        for i, item in enumerate(self.file.objects.get(entry.id, ())):
            inside = self._inside(codes, item, entry)
            ignored = item.crowd and self.crowd == "ignore"
            # Crowds first, then from the largest to the smallest, ties in the file's order.
            order = (not ignored, -int(inside.sum()), i)
            value = IGNORE_INDEX if ignored else item.category + self.background
            painted.append((order, value, np.packbits(inside)))
        for _, value, packed in sorted(painted, key=lambda each: each[0]):
            inside = np.unpackbits(packed, count=label.size).reshape(label.shape).astype(bool)
            label[inside] = value
        return label

    def _inside(self, codes: Any, item: CocoObject, entry: CocoImage) -> NDArray[np.bool_]:
        """The pixels (H, W) of an object."""
        where = f"{self.file.name}: annotation {item.id} of {entry.file_name}"
        size, outline = [entry.height, entry.width], item.outline
        try:
            if isinstance(outline, list):
                _check_polygons(outline, entry)
                merged = codes.merge(codes.frPyObjects(outline, *size))
                return decode_runs(merged["counts"].decode(), (entry.height, entry.width))
            if outline.get("size") != size:
                raise ValueError(
                    f"a run-length code of size {shorten(repr(outline.get('size')), 40)}, but the "
                    f"image has {size}"
                )
            counts = outline.get("counts")
            if not isinstance(counts, (list, str)):
                raise ValueError("a run-length code without counts")
            return decode_runs(counts, (entry.height, entry.width))
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{where}: {shorten(error)}") from error


def _found(root: Path, split: str) -> str:
    for place in ANNOTATIONS:
        name = place.format(split=split)
        if (root / name).is_file():
            return name
    places = ", ".join(place.format(split=split) for place in ANNOTATIONS)
    raise DataError(f"{root}: no annotations of {split}; looked for {places}")


def coco_splits(root: str | Path) -> list[str]:
    """The splits whose annotations are in a folder, in alphabetical order."""
    found = set()
    for place in ANNOTATIONS:
        before, after = place.split("{split}")
        for path in Path(root).glob(place.format(split="*")):
            name = path.relative_to(root).as_posix()
            split = name[len(before) : len(name) - len(after)]
            if _found(Path(root), split) == name and not split.startswith("instances_"):
                found.add(split)
    return sorted(found)


def read_coco(path: Path, name: str) -> CocoFile:
    """A file of annotations; what it says about outlines is checked when they are used.

    Args:
        path: the file.
        name: its name in messages.

    Raises:
        DataError: it cannot be read, or is not COCO's format; the message names the entry.
    """
    try:
        content = parse_json(read_regular(path, name, "MAX_ANNOTATION_BYTES"))
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: not COCO's format; expected images, annotations and categories")
    categories = _categories(content, name)
    images = list(_images(content, name))
    known = {image.id for image in images}
    if len(known) < len(images):
        raise DataError(f"{name}: images: an id is given twice")
    objects: dict[int, list[CocoObject]] = {}
    indices = {id: i for i, id in enumerate(categories)}
    for entry in _entries(content, "annotations", name):
        item = _object(entry, indices, known, name)
        objects.setdefault(entry["image_id"], []).append(item)
    return CocoFile(name, list(categories.values()), images, objects)


def _entries(content: dict[str, Any], key: str, name: str) -> Iterator[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{name}: not COCO's format: no list {key!r} in it")
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{name}: {key}: {shorten(repr(entry), 60)} is no entry")
        yield entry


def _categories(content: dict[str, Any], name: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in _entries(content, "categories", name):
        id, title = entry.get("id"), entry.get("name")
        if type(id) is not int or not isinstance(title, str):
            raise DataError(f"{name}: categories: {shorten(repr(entry), 60)} has no id and name")
        if id in found:
            raise DataError(f"{name}: categories: id {id} is given twice")
        found[id] = title
    if len({*found.values()}) < len(found):
        twice = next(t for t in found.values() if [*found.values()].count(t) > 1)
        raise DataError(f"{name}: categories: {shorten(repr(twice), 60)} is listed twice")
    return dict(sorted(found.items()))


def _images(content: dict[str, Any], name: str) -> Iterator[CocoImage]:
    for entry in _entries(content, "images", name):
        id, file = entry.get("id"), entry.get("file_name")
        sides = entry.get("height"), entry.get("width")
        if type(id) is not int or not isinstance(file, str):
            raise DataError(f"{name}: images: {shorten(repr(entry), 60)} has no id and file_name")
        if not all(type(side) is int and side > 0 for side in sides):
            raise DataError(f"{name}: images: {shorten(file, 60)} has no height and width")
        check_name(file, name)
        yield CocoImage(id, file, *sides)  # type: ignore[arg-type]


def _object(
    entry: dict[str, Any], indices: dict[int, int], images: set[int], name: str
) -> CocoObject:
    shown = f"{name}: annotation {shorten(repr(entry.get('id')), 40)}"
    for key, known in (("image_id", images), ("category_id", indices)):
        value = entry.get(key)
        if type(value) is not int or value not in known:
            raise DataError(f"{shown}: {key} {shorten(repr(value), 40)} is not listed")
    outline = entry.get("segmentation")
    if not isinstance(outline, (list, dict)):
        raise DataError(f"{shown}: has no segmentation, so it is a box alone, which gives no mask")
    crowd = entry.get("iscrowd", 0) in (1, True)
    return CocoObject(entry.get("id"), indices[entry["category_id"]], crowd, outline)


def _check_polygons(polygons: Sequence[Any], entry: CocoImage) -> None:
    """Raises ValueError unless these are polygons near the image: drawing them is work."""
    if not polygons:
        raise ValueError("no polygon in its segmentation")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon needs three points or more, x and y of each")
        for i, number in enumerate(polygon):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"a coordinate {shorten(repr(number), 40)}, not a number")
            side = entry.height if i % 2 else entry.width
            if not math.isfinite(number) or not -side <= number <= 2 * side:
                raise ValueError(f"a coordinate {number:g} far outside the image")
