"""Images to label maps on disk."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mcibi_fast.errors import DataWarning
from mcibi_fast.inference.predict import find_images, predict
from mcibi_fast.models import SegmentationHead
from mcibi_fast.models.weights import ModelSpec

Output = namedtuple("Output", "logits")
SPEC = ModelSpec(
    name="fcn",
    backbone="test_resnet",
    options={},
    classes=["dark", "bright"],
    palette=[[10, 20, 30], [200, 100, 50]],
    mean=[0.5, 0.5, 0.5],
    std=[0.25, 0.25, 0.25],
)


class DarkOrBright(nn.Module):
    """Class 1 where the normalised image is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.needs_labels = SegmentationHead(), False
        self.sign = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, images: Tensor) -> Output:
        assert not self.training and not torch.is_grad_enabled()
        small = F.avg_pool2d(images.mean(1, keepdim=True), 4, ceil_mode=True)
        return Output(small * self.sign.view(1, 2, 1, 1))


def halves(width: int, height: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_label_maps_have_the_image_size_indices_and_palette(tmp_path: Path) -> None:
    halves(37, 22).save(tmp_path / "a.png")
    result = predict(DarkOrBright(), SPEC, tmp_path / "a.png", tmp_path / "out")
    assert result.written == [tmp_path / "out" / "labels" / "a.png"] and not result.errors
    label = Image.open(result.written[0])
    assert label.mode == "P" and label.size == (37, 22)
    assert label.getpalette()[:6] == [10, 20, 30, 200, 100, 50]
    indices = np.array(label)
    assert (indices[:, :14] == 0).all() and (indices[:, 23:] == 1).all()
    overlay = np.array(Image.open(tmp_path / "out" / "overlays" / "a.png"))
    assert overlay.shape == (22, 37, 3)
    assert np.argmax(overlay[0, -1]) == 0  # reddish class colour over white


def test_folder_with_subfolders_and_equal_stems(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("x/a.png", "x/a.jpg", "y/a.png", "b.JPG"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        halves(16, 16).save(source / name)
    (source / "notes.txt").write_text("no image")
    result = predict(DarkOrBright(), SPEC, source, tmp_path / "out", overlays=False)
    names = {str(p.relative_to(tmp_path / "out" / "labels")) for p in result.written}
    assert names == {"x/a.png.png", "x/a.jpg.png", "y/a.png", "b.png"}
    assert not (tmp_path / "out" / "overlays").exists()


def test_corrupt_images_are_named_and_the_rest_is_done(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        halves(64, 64).save(source / name)
    (source / "b.jpg").write_bytes((source / "b.jpg").read_bytes()[:300])
    (source / "c.jpg").write_bytes(b"")
    result = predict(DarkOrBright(), SPEC, source, tmp_path / "out")
    assert [p.name for p in result.written] == ["a.png"]
    assert len(result.errors) == 2
    assert "b.jpg: cannot be decoded" in result.errors[0]
    assert "c.jpg: empty (0 bytes)" in result.errors[1]


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source: .*nowhere does not exist"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        find_images(tmp_path)


def test_grey_and_transparent_images_are_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "1"):
        halves(8, 6).convert(mode).save(tmp_path / "a.png")
        result = predict(DarkOrBright(), SPEC, tmp_path / "a.png", tmp_path / mode)
        assert not result.errors
        with Image.open(tmp_path / mode / "overlays" / "a.png") as overlay:
            assert np.array(overlay).shape == (6, 8, 3)


def test_maps_have_the_size_of_the_turned_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn clockwise: the left half comes to the top
    halves(36, 22).save(tmp_path / "a.jpg", exif=exif, quality=100)
    result = predict(DarkOrBright(), SPEC, tmp_path / "a.jpg", tmp_path / "out")
    label = np.array(Image.open(result.written[0]))
    assert label.shape == (36, 22)
    assert (label[:14] == 0).all() and (label[22:] == 1).all()
    assert Image.open(tmp_path / "out/overlays/a.png").size == (22, 36)


def test_16_bits_and_fractions_are_neither_white_nor_black(tmp_path: Path) -> None:
    grey = np.array(halves(16, 16).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "a.png")
    Image.fromarray(grey.astype(np.float32) / 300).save(tmp_path / "b.tif")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "c.tif")
    result = predict(DarkOrBright(), SPEC, tmp_path, tmp_path / "out")
    assert [path.name for path in result.written] == ["a.png", "b.png"]
    (error,) = result.errors
    assert "c.tif: fractions from 0 to 255; save it with 8 or 16 bits" in error
    for name, bright in (("a", 198), ("b", 217)):
        overlay = np.array(Image.open(tmp_path / f"out/overlays/{name}.png"))
        assert np.abs(overlay[0, -1] - (0.45 * bright + 0.55 * np.array([200, 100, 50]))).max() <= 1


def test_dropped_bands_are_said_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        halves(16, 16).convert("RGBA").save(tmp_path / name)
    with pytest.warns(DataWarning) as caught:
        predict(DarkOrBright(), SPEC, tmp_path, tmp_path / "out")
    assert len(caught) == 1
    assert "a.png: band 4 (alpha) dropped; its colours are" in str(caught[0].message)


def test_full_disk_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves(16, 16).save(tmp_path / "a.png")

    def save(self: Image.Image, file: BinaryIO, format: str) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        predict(DarkOrBright(), SPEC, tmp_path / "a.png", tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
