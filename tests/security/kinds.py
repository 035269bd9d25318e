"""The kinds of files that are fuzzed: good ones, and what reads them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mcibi_fast.data import (
    ADE20K,
    LIP,
    VOC,
    VSPW,
    CocoDataset,
    COCOStuff,
    DataError,
    ShardedDataset,
)
from mcibi_fast.data.archives import Files
from mcibi_fast.data.folder import class_list, read_label
from mcibi_fast.data.images import FORMATS, read_pixels
from mcibi_fast.data.listed import ListedDataset
from mcibi_fast.data.pascal_context import convert
from mcibi_fast.recipes.registry import configure
from tests.data import trees
from tests.security import places
from tests.security.fuzz import Kind
from tests.security.mutations import repair_png
from tests.security.run_kinds import REFUSED, RUN_KINDS

Read = Callable[[bytes, Path], object]


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def pictures(form: str) -> Sequence[bytes]:
    """In every mode that the format knows."""
    colour = Image.fromarray(places.pixels())
    modes = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "F", "LAB")
    if form in ("WEBP",):
        return [saved(colour, form), saved(colour.convert("RGBA"), form, lossless=True)]
    found = []
    for mode in modes:
        try:
            found.append(saved(of_mode(colour, mode), form))
        except (OSError, ValueError):
            continue
    if form == "TIFF":
        found += [
            saved(colour, form, compression=c) for c in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")
        ]
    if form in ("JPEG", "TIFF"):
        exif = Image.Exif()
        exif[0x010E], exif[0x011A] = "a text", 72.0
        exif.get_ifd(0x8769)[0x9000] = b"0220"
        found.append(saved(colour, form, exif=exif, icc_profile=bytes(200)))
    if form == "JPEG":
        found += [saved(colour, form, progressive=True), saved(colour, "MPO")]
    return found


def of_mode(colour: Image.Image, mode: str) -> Image.Image:
    """The picture in another mode, whose whole range it has."""
    grey = np.array(colour.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    return Image.new(mode, (9, 5)) if mode == "LAB" else colour.convert(mode)


def masks() -> Sequence[bytes]:
    label = Image.fromarray(places.mask())
    palette = label.copy()
    palette.putpalette(bytes(range(9)))
    return [
        saved(label, "PNG"),
        saved(palette, "PNG"),
        saved(palette, "PNG", bits=2),
        saved(label.convert("1"), "PNG"),
        saved(Image.fromarray(places.mask().astype(np.uint16)), "PNG"),
    ]


def read_image(content: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(content)
    read_pixels(folder / "x.png")


def read_mask(content: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(content)
    label = read_label(folder, "x.png", num_classes=3)
    assert ((label < 3) | (label == 255)).all()


@functools.cache
def zipped() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as top:
        stored = trees.pack(trees.ade20k(Path(top) / "ade"), Path(top) / "x.zip").read_bytes()
    files = {"images/training/a.jpg": pictures("JPEG")[0], "annotations/training/a.png": masks()[0]}
    return [
        stored,
        deflated(files),
        deflated({"ADE/" + name: file for name, file in files.items()}),
    ]


def deflated(files: dict[str, bytes]) -> bytes:
    import zipfile

    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def read_zip(content: bytes, folder: Path) -> None:
    (folder / "x.zip").write_bytes(content)
    dataset = ADE20K(folder / "x.zip", "train")
    dataset.read(len(dataset) - 1)


@functools.cache
def mats() -> Sequence[bytes]:
    label = places.mask()
    names = np.array([f"name {k}" for k in range(182)], object)[:, None]
    found = []
    for compressed in (False, True):
        for content in (
            {"S": label, "names": names},
            {"GTcls": {"Segmentation": label, "x": [1.5]}},
        ):
            buffer = BytesIO()
            savemat(buffer, content, do_compression=compressed)
            found.append(buffer.getvalue())
    return found


def read_mats(content: bytes, folder: Path) -> None:
    (folder / "x.mat").write_bytes(content)
    try:
        read_mat_mask(VOC, folder)
    except DataError:  # it may be of the other dataset
        read_mat_mask(COCOStuff, folder)


def read_mat_mask(dataset: type[ListedDataset], folder: Path) -> None:
    dataset.classes_of(dataset.read_mask(Files(folder), "x.mat"), "x.mat")


def indices() -> Sequence[bytes]:
    index = places.index(pictures("JPEG")[0], masks()[0])
    return [json.dumps(index).encode(), json.dumps(index, indent=1).encode()]


def read_index(content: bytes, folder: Path) -> None:
    places.shards(folder, pictures("JPEG")[0], masks()[0])
    (folder / "val/index.json").write_bytes(content)
    dataset = ShardedDataset(folder, "val")
    for i in range(min(len(dataset), 3)):
        dataset.read(i)


def shards() -> Sequence[bytes]:
    return [image + masks()[0] for image in pictures("JPEG")[:2]]


def read_shard(content: bytes, folder: Path) -> None:
    """The index says that the shard is right as it is."""
    label = max(content.rfind(b"\x89PNG"), 1)
    places.shards(folder, content[:label] or b"\0", content[label:] or b"\0")
    ShardedDataset(folder, "val").read(0)


def class_lists() -> Sequence[bytes]:
    names = places.CLASSES
    palette = [[1, 2, 3]] * 3
    return [
        "\n".join(names).encode(),
        json.dumps(names).encode(),
        json.dumps({"classes": names, "palette": palette}).encode(),
    ]


def read_class_list(content: bytes, folder: Path) -> None:
    name = "classes.json" if content[:1] in (b"{", b"[") else "classes.txt"
    (folder / name).write_bytes(content)
    class_list(folder)


def lists() -> Sequence[bytes]:
    return [b"77_471474\n9_1\n", b"9_1\r\n\r\n77_471474", b"\xef\xbb\xbf9_1\n"]


def read_list(content: bytes, folder: Path) -> None:
    trees.lip(folder)
    (folder / "train_id.txt").write_bytes(content)
    dataset = LIP(folder, "train")
    dataset.read(0)


def class_numbers() -> Sequence[bytes]:
    numbers = {name: str(k) for k, name in enumerate(VSPW.classes, start=1)}
    return [json.dumps({"others": "0"} | numbers).encode()]


def read_class_numbers(content: bytes, folder: Path) -> None:
    (folder / "label_num_dic_final.json").write_bytes(content)
    VSPW.class_names(Files(folder))


def annotations() -> Sequence[bytes]:
    image = {"file_name": "2008_1.jpg", "image_id": 1, "height": 4, "width": 5, "phase": "train"}
    regions = [
        {"image_id": 1, "category_id": 2, "segmentation": {"size": [4, 5], "counts": counts}}
        for counts in ([3, 7, 10], "37:")
    ]
    return [json.dumps({"images": [image], "annos_segmentation": regions}).encode()]


def read_annotations(content: bytes, folder: Path) -> None:
    (folder / "JPEGImages").mkdir()
    (folder / "trainval_merged.json").write_bytes(content)
    convert(folder)


def coco() -> Sequence[bytes]:
    image = {"id": 1, "file_name": "a.png", "height": 5, "width": 9}
    outlines = (
        [[1, 1, 8, 1, 8.5, 4]],
        {"size": [5, 9], "counts": [3, 7, 35]},
        {"size": [5, 9], "counts": "37S1"},
    )
    things = [
        {"id": i, "image_id": 1, "category_id": 2, "iscrowd": i % 2, "segmentation": outline}
        for i, outline in enumerate(outlines)
    ]
    categories = [{"id": 2, "name": "cat"}]
    content = {"images": [image], "annotations": things, "categories": categories}
    return [json.dumps(content).encode(), json.dumps(content, indent=1).encode()]


def read_coco(content: bytes, folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "train.json").write_bytes(content)
    Image.new("RGB", (9, 5)).save(folder / "train/a.png")
    _, label = CocoDataset(folder, "train").read(0)
    assert np.isin(label, [0, 1, 255]).all()


def toml() -> Sequence[bytes]:
    return [b'epochs = 3\nmodel.options.form = "paper"\n[optimizer]\nlr = 0.1\nname = "sgd"\n']


def read_settings(content: bytes, folder: Path) -> None:
    (folder / "run.toml").write_bytes(content)
    configure("scenes", None, [], file=str(folder / "run.toml"))


def of_pictures(form: str) -> Kind:
    seeds = functools.cache(lambda: pictures(form))
    return Kind(seeds, read_image, *([repair_png] if form == "PNG" else []))


# A new kind of file gets a row here.
KINDS: dict[str, Kind] = {
    **{form.lower(): of_pictures(form) for form in FORMATS},
    "gif": of_pictures("GIF"),
    "mask": Kind(functools.cache(masks), read_mask, repair_png),
    "zip": Kind(zipped, read_zip),
    "mat": Kind(mats, read_mats),
    "index": Kind(functools.cache(indices), read_index),
    "shard": Kind(functools.cache(shards), read_shard),
    "class_list": Kind(class_lists, read_class_list),
    "list": Kind(lists, read_list),
    "class_numbers": Kind(class_numbers, read_class_numbers),
    "annotations": Kind(annotations, read_annotations),
    "coco": Kind(coco, read_coco),
    "toml": Kind(toml, read_settings, errors=REFUSED),
    **RUN_KINDS,
}
