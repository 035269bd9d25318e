"""The published datasets by the names that the command line and the recipes use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mcibi_fast.data.ade20k import ADE20K
from mcibi_fast.data.cityscapes import Cityscapes
from mcibi_fast.data.coco_stuff import COCOStuff, COCOStuff171
from mcibi_fast.data.folder import CAMVID_CLASSES
from mcibi_fast.data.folder_video import FolderVideos
from mcibi_fast.data.lip import CIHP, LIP
from mcibi_fast.data.listed import ListedDataset
from mcibi_fast.data.pascal_context import PascalContext, PascalContext60
from mcibi_fast.data.video import VideoDataset
from mcibi_fast.data.voc import VOC
from mcibi_fast.data.vspw import VSPW

DATASETS: dict[str, type[ListedDataset]] = {
    "ade20k": ADE20K,
    "lip": LIP,
    "cihp": CIHP,
    "cityscapes": Cityscapes,
    "coco_stuff": COCOStuff,
    "coco_stuff_171": COCOStuff171,
    "pascal_context": PascalContext,
    "pascal_context_60": PascalContext60,
    "voc": VOC,
    "vspw": VSPW,
}


def named(name: str) -> type[ListedDataset]:
    """The dataset called ``name``. Raises ValueError, listing the names, when there is none."""
    if name not in DATASETS:
        raise ValueError(f"no dataset {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def video_dataset(
    name: str, root: str | Path, split: str, *, bad: Literal["raise", "skip"] = "raise"
) -> VideoDataset:
    """A split of the published video dataset ``name``: "vspw", or "camvid" as frames of its videos.

    ``bad`` is `VSPW`'s, whose bad files are known. Raises ValueError for another name, and what the
    dataset raises.
    """
    if name == "camvid":
        return FolderVideos(root, split, classes=CAMVID_CLASSES)
    if name == "vspw":
        return VSPW(root, split, bad=bad)
    raise ValueError(f"no video dataset {name!r}; there are camvid, vspw")
