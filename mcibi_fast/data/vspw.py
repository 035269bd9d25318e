"""VSPW 480p, video scene parsing in the wild: 3,536 videos, 124 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mcibi_fast.data.archives import Files
from mcibi_fast.data.base import SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import decode_colours, fit
from mcibi_fast.data.listed import Item, ListedDataset, Listing, value_map
from mcibi_fast.data.reading import check_class_names
from mcibi_fast.data.video import VideoDataset
from mcibi_fast.limits import check_limit
from mcibi_fast.progress import track
from mcibi_fast.terminal import warn
from mcibi_fast.untrusted import parse_json, shorten
from mcibi_fast.viz.palette import distinct_palette

_NAMES = """
wall, ceiling, door, stair, ladder, escalator, Playground_slide, handrail_or_fence, window, rail,
goal, pillar, pole, floor, ground, grass, sand, athletic_field, road, path, crosswalk, building,
house, bridge, tower, windmill, well_or_well_lid, other_construction, sky, mountain, stone, wood,
ice, snowfield, grandstand, sea, river, lake, waterfall, water, billboard_or_Bulletin_Board,
sculpture, pipeline, flag, parasol_or_umbrella, cushion_or_carpet, tent, roadblock, car, bus, truck,
bicycle, motorcycle, wheeled_machine, ship_or_boat, raft, airplane, tyre, traffic_light, lamp,
person, cat, dog, horse, cattle, other_animal, tree, flower, other_plant, toy, ball_net, backboard,
skateboard, bat, ball, cupboard_or_showcase_or_storage_rack, box, traveling_case_or_trolley_case,
basket, bag_or_package, trash_can, cage, plate, tub_or_bowl_or_pot, bottle_or_cup, barrel, fishbowl,
bed, pillow, table_or_desk, chair_or_seat, bench, sofa, shelf, bathtub, gun, commode, roaster,
other_machine, refrigerator, washing_machine, Microwave_oven, fan, curtain, textiles, clothes,
painting_or_poster, mirror, flower_pot_or_vase, clock, book, tool, blackboard, tissue,
screen_or_television, computer, printer, Mobile_phone, keyboard, other_electronic_product, fruit,
food, instrument, train
"""
_CLASSES = 124
_PNG_HEADER = 26  # up to and with the colour type
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_LIST = "label_num_dic_final.json"


class VSPW(VideoDataset, ListedDataset):
    """Masks hold 0 for other things and 1..124 for class 0..123; everything else is ignored.

    Values outside 0..124 occur (252, 253, 254): they are ignored, a warning says so once, and
    `odd_values` counts them. A split may have frames without masks (``test`` has, where its masks
    were not published): they are streamed, and are no samples.

    Args:
        root, split, transform: see `ListedDataset`; the splits are "train", "val" and "test".
        bad: "raise": an empty image, a mask in colour and a missing file each raise a DataError
            (the first two when they are read). "skip": a few bytes of each image and mask are
            checked first; frames without a usable image are left out, those without a usable mask
            lose their label, a warning counts both, and `skipped` names them.
        progress: show how many files are checked.

    The classes are those of ``label_num_dic_final.json`` if it exists.
    """

    title = "VSPW"
    layout = (
        "data/<video>/origin/*.jpg and data/<video>/mask/*.png, train.txt, val.txt, test.txt and "
        "label_num_dic_final.json"
    )
    classes = " ".join(_NAMES.split()).split(", ")
    palette = distinct_palette(_CLASSES)
    label_map = value_map(
        {k: k - 1 for k in range(1, _CLASSES + 1)}, ignored=[0, *range(_CLASSES + 1, 256)]
    )
    sizes: ClassVar[dict[str, int]] = {"train": 198_244, "val": 24_502, "test": 28_887}
    video_counts: ClassVar[dict[str, int]] = {"train": 2_806, "val": 343, "test": 387}
    checked = ("train", "val", "test")

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        *,
        bad: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> None:
        SegmentationDataset.__init__(self, transform)
        if bad not in ("raise", "skip"):
            raise ValueError(f"bad: expected 'raise' or 'skip', got {bad!r}")
        self.root, self.split = Path(root), split
        self.files = self.open_files(root)
        items, missing, _ = self.find(self.files, split)
        self.classes = self.class_names(self.files)
        self.skipped: list[str] = []
        if bad == "skip":
            items = self._usable(items, missing, progress)
        elif missing:
            more = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}: missing{more}; unpack {self.title} again")
        if not items:
            raise DataError(f"{root}: no images of {split}; expected {self.layout}")
        self.items = items
        self._videos = by_video(items)
        self._names = list(self._videos)
        self._labelled = [
            [i for i, item in enumerate(frames) if item.label] for frames in self._videos.values()
        ]
        # Shared memory, as the epoch's: a loader's workers count, too.
        self._odd = torch.zeros(256, dtype=torch.int64).share_memory_()

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        """Every frame of every listed video; ``label`` is "" where a video has no masks.

        Only a video of ``test`` may have none.
        """
        path = files.locate(f"{split}.txt")
        home = PurePosixPath(path).parent / "data"
        items = []
        for video in files.lines(path):
            images, labels = str(home / video / "origin"), str(home / video / "mask")
            stems = {n[:-4] for n in files.names(images) if n.endswith(".jpg")}
            masks = {n[:-4] for n in files.names(labels) if n.endswith(".png")}
            if not stems:
                items.append(Item(f"{video}/*", f"{images}/*.jpg", f"{labels}/*.png"))
            has_masks = bool(masks) or split != "test"
            items.extend(
                Item(f"{video}/{s}", f"{images}/{s}.jpg", f"{labels}/{s}.png" if has_masks else "")
                for s in sorted(stems | masks)
            )
            # A list may name one video many times, also by other spellings.
            check_limit("MAX_NAMES", len(items), f"{path}: {len(items):,} frames", DataError)
        return items

    @classmethod
    def find(cls, files: Files, split: str) -> Listing:
        """The files of ``split`` that exist. Raises DataError for a missing list."""
        if split not in cls.sizes:
            raise DataError(f"{cls.title}: no split {split!r}; there is {', '.join(cls.sizes)}")
        items = cls.listing(files, split)
        folders = {str(PurePosixPath(p).parent) for item in items for p in item[1:] if p}
        there = {f"{folder}/{name}" for folder in folders for name in files.names(folder)} | {""}
        missing = [path for item in items for path in item[1:] if path not in there]
        whole = [item for item in items if item.image in there and item.label in there]
        return Listing(whole, missing, len(items))

    @classmethod
    def class_names(cls, files: Files) -> list[str]:
        """The names that ``label_num_dic_final.json`` gives to 1..124; `classes` without it."""
        path = files.find(_LIST)
        if path is None:
            return list(cls.classes)
        try:
            content = parse_json(files.read(path, "MAX_TEXT_BYTES"))
            numbers = {int(number): name for name, number in content.items()}
        except (ValueError, AttributeError, TypeError, OverflowError) as error:
            raise DataError(
                f"{files.describe(path)}: not a table of names and numbers ({shorten(error)}); "
                "replace it"
            ) from error
        numbers.pop(0, None)  # "others"
        if sorted(numbers) != list(range(1, _CLASSES + 1)):
            raise DataError(
                f"{files.describe(path)}: {len(numbers)} classes; expected the numbers "
                f"1..{_CLASSES}; replace it"
            )
        names = [numbers[k] for k in range(1, _CLASSES + 1)]
        check_class_names(names, files.describe(path))
        return names

    @staticmethod
    def odd(values: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pixels of each mask value that is neither a class, 0, nor 255: (256,)."""
        counts = np.bincount(np.clip(values, 0, 255).ravel(), minlength=256)
        counts[: _CLASSES + 1] = counts[255] = 0
        return counts

    @property
    def odd_values(self) -> dict[int, int]:
        """The values outside 0..124 found so far, and the number of pixels with each."""
        return {int(v): int(self._odd[v]) for v in self._odd.nonzero()[:, 0]}

    def videos(self) -> list[str]:
        return list(self._names)

    def frames(self, video: int) -> int:
        return len(self._videos[self._names[video]])

    def labelled(self, video: int) -> Sequence[int]:
        return self._labelled[video]

    def frame_name(self, video: int, frame: int) -> str:
        return self._item(video, frame).name

    def read_frame(
        self, video: int, frame: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
        item = self._item(video, frame)
        image = self.files.describe(item.image)
        decoded = decode_colours(self.files.read(item.image), image, self.notes)
        if not item.label:
            return decoded.pixels, None
        values = self.read_mask(self.files, item.label)
        name = self.files.describe(item.label)
        pixels = fit(decoded, values, image, name, self.notes)
        self._note(values, name)
        return pixels, self.classes_of(values, name)

    def _item(self, video: int, frame: int) -> Item:
        return self._videos[self._names[video]][frame]

    def _note(self, values: NDArray[np.integer], name: str) -> None:
        counts = torch.from_numpy(self.odd(values))
        if not counts.any():
            return
        first = not self._odd.any()
        self._odd += counts
        if first:
            found = ", ".join(map(str, counts.nonzero()[:, 0].tolist()))
            warn(
                f"{name}: {int(counts.sum())} pixels hold {found}, which is no class; "
                "they are ignored, in this and in all further masks (odd_values counts them)"
            )

    def _usable(self, items: list[Item], missing: list[str], progress: bool) -> list[Item]:
        """The items whose image can be used, without the masks that cannot."""
        absent = set(missing)
        every = self.listing(self.files, self.split) if absent else items
        usable, images, masks = [], 0, 0
        title = f"{self.title} {self.split}"
        for item in track(every, title, unit="frame", show=progress, leave=True):
            if item.image in absent or not self.files.head(item.image, 1):
                self.skipped.append(item.image)
                images += 1
                continue
            if item.label and (item.label in absent or not self._is_index_mask(item.label)):
                self.skipped.append(item.label)
                masks += 1
                item = item._replace(label="")
            usable.append(item)
        if self.skipped:
            warn(
                f"{self.title} {self.split}: {images} frames left out and {masks} masks "
                f"not used of {len(every)}, empty, missing or in colour; the first is "
                f"{self.skipped[0]}"
            )
        return usable

    def _is_index_mask(self, path: str) -> bool:
        header = self.files.head(path, _PNG_HEADER)
        whole = len(header) == _PNG_HEADER and header.startswith(_PNG_SIGNATURE)
        return whole and header[-1] in (_GREY, _PALETTE)


def by_video(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each video, in order."""
    videos: dict[str, list[Item]] = {}
    for item in items:
        videos.setdefault(item.name.rpartition("/")[0], []).append(item)
    return videos
