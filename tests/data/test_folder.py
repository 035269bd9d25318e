from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mcibi_fast.data import CAMVID_CLASSES, IMAGENET_MEAN, IMAGENET_STD, DataError, FolderDataset


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_reads_images_masks_and_names(tree):
    dataset = FolderDataset(tree, "train")
    assert dataset.classes == ["sky", "road", "tree"]
    assert dataset.palette.shape == (3, 3)
    assert [dataset.name(i) for i in range(len(dataset))] == ["a", "b", "c"]
    sample = dataset[1]
    image = np.array(Image.open(tree / "images/train/b.png")).transpose(2, 0, 1) / 255
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(sample["image"], torch.tensor((image - mean) / std).float())
    assert np.array_equal(sample["label"], np.array(Image.open(tree / "labels/train/b.png")))
    assert sample["label"].dtype == torch.uint8
    assert len(FolderDataset(tree, "val")) == 1


def test_palette_masks_are_indices_and_never_grey_values(tree, write_label):
    indices = np.arange(16 * 24).reshape(16, 24) % 3
    mask = Image.fromarray(indices.astype(np.uint8))
    mask.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    mask.save(tree / "labels/train/a.png", bits=2)
    assert Image.open(tree / "labels/train/a.png").mode == "P"
    assert np.array_equal(FolderDataset(tree, "train")[0]["label"], indices)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_are_indices_too(tree, bits):
    """What PNG optimisers write; PIL stretches 2 and 4 bits to 0..255."""
    (tree / "classes.txt").write_text("\n".join(f"c{i}" for i in range(16)))
    indices = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 2**bits
    spread = np.unpackbits(indices[..., None], axis=-1)[..., -bits:].reshape(16, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in spread)
    (tree / "labels/train/a.png").write_bytes(png(24, 16, bits, rows))
    assert np.array_equal(FolderDataset(tree, "train")[0]["label"], indices)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A greyscale PNG with ``bits`` per pixel."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_masks_of_16_bits(tree, write_label):
    label = np.full((16, 24), 2, np.uint16)
    label[0] = 255
    write_label("train/a", label)
    assert np.array_equal(FolderDataset(tree, "train")[0]["label"], label)
    label[3, 4] = 258  # would be 2 in eight bits
    write_label("train/a", label)
    with pytest.raises(DataError, match=r"labels/train/a\.png: label 258 with 3 classes"):
        FolderDataset(tree, "train")[0]


def test_grey_image_becomes_rgb(tree):
    Image.new("L", (24, 16), 77).save(tree / "images/train/b.png")
    pixels, _ = FolderDataset(tree, "train").read(1)
    assert (pixels == 77).all()
    assert pixels.shape == (16, 24, 3)


def test_classes_from_json(tree):
    palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    content = {"classes": ["x", "y", "z"], "palette": palette}
    (tree / "classes.json").write_text(json.dumps(content))
    dataset = FolderDataset(tree, "train")
    assert dataset.classes == ["x", "y", "z"]
    assert dataset.palette.tolist() == palette
    (tree / "classes.json").write_text(json.dumps(["x", "y", "z"]))
    assert FolderDataset(tree, "train").classes == ["x", "y", "z"]


def test_classes_from_the_argument_come_first(tree):
    assert FolderDataset(tree, "train", classes=["p", "q", "r"]).classes == ["p", "q", "r"]


def test_classes_are_counted_over_all_splits_when_unlisted(tree, write_label):
    (tree / "classes.txt").unlink()
    write_label("val/d", np.full((16, 24), 6, np.uint8))
    for split in ("train", "val"):
        assert FolderDataset(tree, split).classes == [f"class_{i}" for i in range(7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"classes\.json: not JSON"),
        ('{"names": []}', r'classes\.json: expected \["name"'),
        (
            '{"classes": ["a"], "palette": [[1, 2, 3], [4, 5, 6]]}',
            "palette of 2 colours, 1 classes",
        ),
        ('{"classes": ["a"], "palette": [[1, 2, 300]]}', r"classes\.json: palette: "),
        ('["a", "b", "a"]', r"classes\.json: class 'a' is listed twice"),
        ("[]", r"classes\.json: 0 classes; 1 to 255"),
    ],
)
def test_bad_class_lists(tree, content, message):
    (tree / "classes.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        FolderDataset(tree, "train")
    one_line(error)


def test_label_out_of_range_names_file_value_and_cure(tree, write_label):
    label = np.zeros((16, 24), np.uint8)
    label[5, 6] = 200
    write_label("train/c", label)
    dataset = FolderDataset(tree, "train")
    with pytest.raises(DataError) as error:
        dataset[2]
    assert one_line(error) == (
        "labels/train/c.png: label 200 with 3 classes; use 0..2, or 255 for pixels to ignore"
    )


def test_missing_mask_is_found_at_once(tree):
    (tree / "labels/train/b.png").unlink()
    with pytest.raises(DataError, match=r"^labels/train/b\.png: missing mask; add it") as error:
        FolderDataset(tree, "train")
    one_line(error)
    (tree / "labels/train/a.png").unlink()
    with pytest.raises(DataError, match=r"labels/train/a\.png: missing mask \(and 1 more\)"):
        FolderDataset(tree, "train")
    FolderDataset(tree, "val")


def test_missing_labels_folder(tree):
    for mask in (tree / "labels/val").iterdir():
        mask.unlink()
    (tree / "labels/val").rmdir()
    with pytest.raises(DataError, match=r"labels/val/d\.png: missing mask"):
        FolderDataset(tree, "val")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\xd8 not an image at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, garble, empty])
@pytest.mark.parametrize("path", ["images/train/a.jpg", "images/train/b.png", "labels/train/a.png"])
def test_files_that_are_not_whole(tree, damage, path):
    damage(tree / path)
    dataset = FolderDataset(tree, "train")
    reason = r"empty \(0 bytes\)" if damage is empty else r"cannot be decoded \(.+\)"
    with pytest.raises(DataError, match=rf"^{path}: {reason}; replace or remove it$") as error:
        dataset[1 if "b.png" in path else 0]
    assert str(tree) not in one_line(error)


def test_broken_png_chunk(tree):
    content = bytearray((tree / "labels/train/a.png").read_bytes())
    content[content.index(b"IDAT") + 6] ^= 0xFF
    (tree / "labels/train/a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"^labels/train/a\.png: cannot be decoded") as error:
        FolderDataset(tree, "train")[0]
    one_line(error)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_masks(tree, mode):
    Image.new(mode, (24, 16)).save(tree / "labels/train/a.png")
    with pytest.raises(DataError, match=rf"^labels/train/a\.png: a colour mask \({mode}\)"):
        FolderDataset(tree, "train")[0]


def test_sizes_that_differ(tree, write_label):
    write_label("train/a", np.zeros((24, 16), np.uint8))
    with pytest.raises(DataError) as error:
        FolderDataset(tree, "train")[0]
    assert one_line(error) == (
        "labels/train/a.png: size 16x24 but images/train/a.jpg has 24x16; "
        "a mask has its image's size"
    )


def test_folders_that_are_not_there(tree, tmp_path_factory):
    with pytest.raises(DataError, match="no split 'test'; there is train, val"):
        FolderDataset(tree, "test")
    with pytest.raises(DataError, match="no folder 'images' in it"):
        FolderDataset(tmp_path_factory.mktemp("empty"), "train")
    (tree / "images" / "test").mkdir()
    with pytest.raises(DataError, match=r"images/test: no \.jpg"):
        FolderDataset(tree, "test")


def test_the_error_stays_one_line_through_a_worker(tree, write_label):
    write_label("train/a", np.full((16, 24), 9, np.uint8))
    with pytest.raises(DataError, match=r"^labels/train/a\.png: label 9 with 3 classes") as error:
        list(DataLoader(FolderDataset(tree, "train"), num_workers=1))
    one_line(error)


def test_a_running_worker_sees_the_next_epoch(tree):
    def transform(image, label, *, epoch, index):
        return torch.tensor([epoch, index]), label

    dataset = FolderDataset(tree, "train", transform)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        assert [batch["image"].tolist() for batch in loader] == [[[epoch, i]] for i in range(3)]


def test_camvid(camvid):
    sizes = {"train": 367, "val": 101, "test": 233}
    for split, count in sizes.items():
        dataset = FolderDataset(camvid, split, classes=CAMVID_CLASSES)
        assert len(dataset) == count
        sample = dataset[count // 2]
        assert sample["image"].shape == (3, 360, 480)
        assert sample["label"].shape == (360, 480)
        label = sample["label"]
        assert label[label != 255].max() < 11
    assert dataset.classes[:4] == ["sky", "building", "pole", "road"]
    # The top of a driving video is sky or building or tree, the bottom is road.
    labels = torch.stack([dataset[i]["label"] for i in range(0, 233, 30)])
    assert (labels[:, -60:, 160:320] == CAMVID_CLASSES.index("road")).float().mean() > 0.5
