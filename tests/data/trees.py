"""Small datasets in the published ones' own layouts, written for the tests."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mcibi_fast.data import VSPW

SIZE = (12, 18)  # height, width


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, values: Sequence[int], *, palette: bool = False) -> np.ndarray:
    """A mask that holds all of ``values``; as a palette PNG its colours are not its indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.resize(np.array(values, np.uint8), SIZE)
    picture = Image.fromarray(mask)
    if palette:
        picture.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)
    return mask


def write_list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_mat(path: Path, **content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def pack(folder: Path, archive: Path, *, within: str = "") -> Path:
    """Zips what lies in ``folder``, below the folder ``within`` in the archive, as downloads do."""
    paths = sorted(folder.rglob("*"))  # before the archive, which may lie there, too
    with zipfile.ZipFile(archive, "w") as file:
        for path in paths:
            name = f"{within}{path.relative_to(folder).as_posix()}"
            if path.is_dir():
                file.mkdir(name) if hasattr(file, "mkdir") else file.writestr(f"{name}/", "")
            else:
                file.write(path, name)
                file.writestr(f"__MACOSX/{name}", b"junk of the Finder's")
    return archive


def ade20k(root: Path) -> Path:
    """ADEChallengeData2016: two images of training, one of validation; masks hold 0..150."""
    home = root / "ADEChallengeData2016"
    for part, names in {
        "training": ["ADE_train_00000001", "ADE_train_00000002"],
        "validation": ["ADE_val_00000001"],
    }.items():
        for seed, name in enumerate(names):
            write_image(home / "images" / part / f"{name}.jpg", seed)
            write_mask(home / "annotations" / part / f"{name}.png", range(151))
    return root


def lip(root: Path) -> Path:
    """LIP: two images of train, one of val; masks hold 0..19."""
    for split, names in {"train": ["77_471474", "9_1"], "val": ["100034_483681"]}.items():
        for seed, name in enumerate(names):
            write_image(root / f"{split}_images" / f"{name}.jpg", seed)
            write_mask(root / f"{split}_segmentations" / f"{name}.png", range(20))
        write_list(root / f"{split}_id.txt", names)
    return root


def cihp(root: Path) -> Path:
    """CIHP: one image each; the list of train writes no leading zeros."""
    for part, split, name in [("Training", "train", "0000006"), ("Validation", "val", "0000001")]:
        write_image(root / part / "Images" / f"{name}.jpg")
        write_mask(root / part / "Category_ids" / f"{name}.png", range(20))
        write_list(
            root / part / f"{split}_id.txt", [name.lstrip("0") if part == "Training" else name]
        )
    return root


def cityscapes(root: Path) -> Path:
    """Cityscapes: two cities of train, one of val; masks hold label ids 0..33."""
    for split, names in {
        "train": ["aachen_000000_000019", "bochum_000000_000313"],
        "val": ["lindau_000000_000019"],
    }.items():
        for seed, name in enumerate(names):
            city = name.split("_")[0]
            write_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", seed)
            folder = root / "gtFine" / split / city
            write_mask(folder / f"{name}_gtFine_labelIds.png", range(34))
            write_mask(folder / f"{name}_gtFine_instanceIds.png", [7])
            write_mask(folder / f"{name}_gtFine_color.png", [0], palette=True)
    return root


def coco_stuff(root: Path, *, values: Sequence[int] = range(183), names: int = 182) -> Path:
    """COCO-Stuff 10k v1.1: two images of train, one of test."""
    for split, stems in {
        "train": ["COCO_train2014_000000000077", "COCO_train2014_000000000149"],
        "test": ["COCO_train2014_000000000081"],
    }.items():
        for seed, stem in enumerate(stems):
            write_image(root / "images" / f"{stem}.jpg", seed)
            mask = np.resize(np.array(values, np.uint16), SIZE)
            listed = np.array([f"name {k}" for k in range(names)], dtype=object)[:, None]
            write_mat(root / "annotations" / f"{stem}.mat", S=mask, names=listed, captions="none")
        write_list(root / "imageLists" / f"{split}.txt", stems)
    return root


def pascal_context(root: Path) -> Path:
    """VOC2010: one image each, with palette masks of 0..59."""
    home = root / "VOC2010"
    for split, name in {"train": "2008_000002", "val": "2008_000003"}.items():
        write_image(home / "JPEGImages" / f"{name}.jpg")
        write_mask(home / "SegmentationClassContext" / f"{name}.png", range(60), palette=True)
        write_list(home / "ImageSets" / "SegmentationContext" / f"{split}.txt", [name])
    return root


def voc(root: Path) -> Path:
    """VOC2012 and SBD beside it.

    VOC's train is a, b and its val is v; SBD's train is b, s and v, its val t.
    """
    home, boundaries = root / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    for seed, name in enumerate("abvst"):
        write_image(home / "JPEGImages" / f"{name}.jpg", seed)
    for name in "abv":
        write_mask(home / "SegmentationClass" / f"{name}.png", [*range(21), 255], palette=True)
    write_list(home / "ImageSets" / "Segmentation" / "train.txt", ["a", "b"])
    write_list(home / "ImageSets" / "Segmentation" / "val.txt", ["v"])
    for name in "bvst":
        mask = np.resize(np.arange(21, dtype=np.uint8)[::-1], SIZE)
        content = {"Segmentation": mask, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": [1]}
        write_mat(boundaries / "cls" / f"{name}.mat", GTcls=content)
    write_list(boundaries / "train.txt", ["b", "s", "v"])
    write_list(boundaries / "val.txt", ["t"])
    return root


def vspw(root: Path) -> Path:
    """VSPW: two videos of train (three and two frames), one of val, one of test; masks 0..124."""
    home = root / "VSPW_480p"
    for split, videos in {
        "train": {"1_a": 3, "2_b": 2},
        "val": {"3_c": 2},
        "test": {"4_d": 2},
    }.items():
        for video, frames in videos.items():
            for i in range(frames):
                stem = f"{10 + i:08d}"
                write_image(home / "data" / video / "origin" / f"{stem}.jpg", seed=i)
                write_mask(home / "data" / video / "mask" / f"{stem}.png", range(125))
        write_list(home / f"{split}.txt", list(videos))
    names = {name: str(k) for k, name in enumerate(VSPW.classes, start=1)}
    (home / "label_num_dic_final.json").write_text(json.dumps({"others": "0"} | names))
    return root


WRITERS = {
    "ade20k": ade20k,
    "lip": lip,
    "cihp": cihp,
    "cityscapes": cityscapes,
    "coco_stuff": coco_stuff,
    "coco_stuff_171": lambda root: coco_stuff(root, values=[0, 1, 11, 13, 92, 182]),
    "pascal_context": pascal_context,
    "pascal_context_60": pascal_context,
    "voc": voc,
    "vspw": vspw,
}
