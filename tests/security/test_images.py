"""Files that are no images, are too large, or never end, wherever images or masks are read."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mcibi_fast.data import DataError, FolderDataset
from mcibi_fast.data.images import FORMATS, decode, decode_bytes, read_pixels
from mcibi_fast.data.metadata import pixels_alone
from mcibi_fast.inference.predict import _output_names
from tests.data import trees
from tests.security import attacks, places
from tests.security.forked import bounded, command, refused

QUIET = ("--cpu", "--quiet")
Attack = Callable[[Path], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return places.checkpoint(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return places.folder(tmp_path / "data")


def put(attack: Attack, path: Path) -> None:
    path.unlink(missing_ok=True)
    attack(path)


def predict(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "images/val/b.png")
    out = data / "out"
    error = refused("predict", checkpoint, data / "images/val", "--out", out, *QUIET)
    assert (out / "labels/a.png").is_file()  # the others are done
    assert "1 unreadable" in error
    return error


def predict_one(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "b.png")
    return refused("predict", checkpoint, data / "b.png", "--out", data / "out", *QUIET)


def video(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "images/val/b.png")
    frames, out = data / "images/val", data / "out"
    outcome = command("video", checkpoint, frames, "--out", out, "--no-overlay", *QUIET)
    assert outcome.value == 0 and "1 frames left out" in outcome.err, outcome
    return outcome.err


def export(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "b.png")
    return refused("export", checkpoint, data / "out.pt2", "--check", data / "b.png")


def evaluate_image(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "images/val/b.png")
    options = ("--root", data, "--split", "val", "--workers", "0", *QUIET)
    return refused("evaluate", checkpoint, *options)


def evaluate_mask(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "labels/val/b.png")
    options = ("--root", data, "--split", "val", "--workers", "0", *QUIET)
    return refused("evaluate", checkpoint, *options)


def check_image(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "images/val/b.png")
    return refused("data", "check", data, "--out", data / "out", "--quiet")


def check_mask(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "labels/val/b.png")
    return refused("data", "check", data, "--out", data / "out", "--quiet")


def pack_image(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "images/val/b.png")
    arguments = ("--split", "val", "--workers", "0", "--quiet")
    return refused("data", "pack", data, data / "out", *arguments)


def pack_mask(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, data / "labels/val/b.png")
    arguments = ("--split", "val", "--workers", "0", "--quiet")
    return refused("data", "pack", data, data / "out", *arguments)


def count_classes(checkpoint: Path, data: Path, attack: Attack) -> str:
    """Without a list of classes all masks are read at once."""
    put(attack, data / "labels/val/b.png")
    (data / "classes.txt").unlink()
    outcome = bounded(FolderDataset, data, "val")
    return outcome.error.removeprefix("DataError: ")


def published_image(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, trees.lip(data / "lip") / "train_images/9_1.jpg")
    return refused("data", "check", "lip", data / "lip", "--out", data / "out", "--quiet")


def published_mask(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, trees.lip(data / "lip") / "train_segmentations/9_1.png")
    return refused("data", "check", "lip", data / "lip", "--out", data / "out", "--quiet")


def frame_of_a_video(checkpoint: Path, data: Path, attack: Attack) -> str:
    put(attack, trees.vspw(data / "vspw") / "VSPW_480p/data/1_a/origin/00000011.jpg")
    return refused("data", "check", "vspw", data / "vspw", "--out", data / "out", "--quiet")


PLACES = (
    *(predict, predict_one, video, export, evaluate_image, evaluate_mask),
    *(check_image, check_mask, pack_image, pack_mask, count_classes),
    *(published_image, published_mask, frame_of_a_video),
)


@pytest.mark.parametrize(
    ("place", "attack"),
    # As the source of predict, a folder is one of images.
    [(p, a) for p in PLACES for a in attacks.NO_IMAGES if (p, a) != (predict_one, "folder")],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
@pytest.mark.thinned(always={"place": [predict]})
def test_what_is_no_image_is_named(checkpoint: Path, data: Path, place, attack: str) -> None:
    """One line in bounded time and memory: the file, and what is wrong with it."""
    make, reason = attacks.NO_IMAGES[attack]
    error = place(checkpoint, data, make)
    assert reason in error, error
    name = {published_image: "9_1.jpg", published_mask: "9_1.png", frame_of_a_video: "00000011.jpg"}
    assert name.get(place, "b.png") in error
    for limit in re.findall(r"more than (MAX_\w+)", reason):
        assert f"set MCIBI_FAST_{limit} in the environment to raise it" in error


@pytest.mark.parametrize("part", ["image", "label"])
@pytest.mark.parametrize("attack", ["pixels", "eps", "scans", "numbers"])
def test_in_shards(tmp_path: Path, part: str, attack: str) -> None:
    make, reason = attacks.NO_IMAGES[attack]
    make(tmp_path / "bad")
    content = dict.fromkeys(("image", "label"), attacks.png(24, 16))
    content[part] = (tmp_path / "bad").read_bytes()
    root = places.shards(tmp_path / "shards", **content)
    error = refused("data", "check", root, "--out", tmp_path / "out", "--quiet")
    assert f"val/000000.tar: sample a ({part}): " in error and reason in error


@pytest.mark.parametrize("attack", ["pixels", "eps", "scans", "numbers"])
def test_in_zip_files(tmp_path: Path, attack: str) -> None:
    make, reason = attacks.NO_IMAGES[attack]
    tree = trees.lip(tmp_path / "lip")
    put(make, tree / "train_images/9_1.jpg")
    archive = trees.pack(tree, tmp_path / "lip.zip")
    error = refused("data", "check", "lip", archive, "--out", tmp_path / "out", "--quiet")
    assert "lip.zip/train_images/9_1.jpg: " in error and reason in error


# Formats


def test_eps_starts_no_ghostscript(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    make, _ = attacks.NO_IMAGES["eps"]
    for place in (predict, evaluate_mask):
        place(checkpoint, data, make)
        shutil.rmtree(data / "out", ignore_errors=True)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "form", ["GIF", "PPM", "TGA", "ICO", "PCX", "SGI", "EPS", "PDF", "JPEG2000"]
)
def test_other_formats_are_not_decoded(form: str) -> None:
    with pytest.raises(
        DataError, match=r"^x\.png: cannot be decoded \(not an image file; expected"
    ):
        decode_bytes(attacks.encoded(form), "x.png")


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_the_content_decides_the_format(tmp_path: Path, form: str) -> None:
    """MPO is what cameras write as .jpg: a JPEG with a second picture behind it."""
    if form == "WEBP" and not features.check("webp"):
        pytest.skip("needs PIL with WebP")
    (tmp_path / "x.png").write_bytes(attacks.encoded(form))
    assert decode(tmp_path / "x.png").size == (24, 16)
    assert read_pixels(tmp_path / "x.png").shape == (16, 24, 3)


def test_colours_that_cannot_be_converted_are_one_line(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(self: Image.Image, mode: str) -> Image.Image:
        raise ValueError(f"conversion from {self.mode} to {mode} not supported")

    put(lambda path: Image.new("L", (24, 16)).save(path, "TIFF"), data / "b.png")
    monkeypatch.setattr(Image.Image, "convert", convert)
    error = refused("predict", checkpoint, data / "b.png", "--out", data / "out", *QUIET)
    assert "b.png: cannot be decoded (conversion from L to RGB not supported)" in error


def test_labels_below_zero_are_no_classes(data: Path) -> None:
    path = data / "labels/val/b.png"
    Image.fromarray(np.full(places.SIZE, -3, np.int32)).save(path, "TIFF")
    with pytest.raises(DataError, match=r"labels/val/b\.png: label -3 with 3 classes"):
        FolderDataset(data, "val").read(1)


# The limit on pixels


def test_48_megapixels_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(attacks.png(8000, 6000))
    assert decode(tmp_path / "x.png").size == (8000, 6000)


def test_the_environment_sets_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(attacks.png(24, 16))
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "383")
    message = r"x\.png: 24x16 = 384 pixels, more than MAX_PIXELS \(383\); set MCIBI_FAST_MAX_PIXELS"
    with pytest.raises(DataError, match=message):
        decode(path)
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "384")
    decode(path)
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="MCIBI_FAST_MAX_PIXELS: expected a whole number"):
        decode(path)


def test_the_limit_may_be_raised_above_pils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "384")
    assert decode_bytes(attacks.png(24, 16), "x.png").size == (24, 16)
    assert decode_bytes(attacks.png(16, 24), "x.png").size == (16, 24)
    with (
        pytest.raises(DataError, match="25x16 = 400 pixels, more than MAX_PIXELS"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        decode_bytes(attacks.png(25, 16), "x.png")


def test_pils_own_limit_is_one_line(checkpoint: Path, data: Path) -> None:
    """Above its limit PIL warns; above twice of it PIL raises, before we know the size."""
    for side in (9600, 16000):
        error = predict(checkpoint, data, attacks.write(attacks.png(side, side)))
        assert "b.png: " in error and "pixels" in error


# What comes with the pixels


def pictures_with_metadata() -> dict[str, bytes]:
    picture = Image.fromarray(places.pixels())
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    more = {"exif": exif, "icc_profile": b"x" * 200_000, "comment": b"a comment"}
    forms = {"": picture, "grey": picture.convert("L"), "cmyk": picture.convert("CMYK")}
    found = {f"jpeg {name}": encode(each, "JPEG", **more) for name, each in forms.items()}
    return found | {
        "progressive": encode(picture, "JPEG", progressive=True, **more),
        "several": encode(picture, "MPO", save_all=True, append_images=[picture.rotate(90)]),
        "png": encode(picture, "PNG", exif=exif, icc_profile=more["icc_profile"]),
        "tiff": encode(picture, "TIFF", exif=exif, icc_profile=more["icc_profile"]),
        "webp": encode(picture, "WEBP", exif=exif, icc_profile=more["icc_profile"]),
    }


def encode(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", pictures_with_metadata())
def test_pixels_are_those_of_the_whole_file(kind: str) -> None:
    content = pictures_with_metadata()[kind]
    expected = Image.open(BytesIO(content))
    picture = decode_bytes(content, "x")
    assert picture.mode == expected.mode and np.array_equal(np.array(picture), np.array(expected))
    assert b"a comment" not in pixels_alone(content)
    if kind.startswith("jpeg"):
        assert len(pixels_alone(content)) < len(content) - 200_000


@pytest.mark.parametrize("cut", [2, 3, 4, 5, 20, 21, 22, 23, 24, 25, 200])
def test_what_is_no_whole_jpeg_stays_as_it_is(cut: int) -> None:
    content = pictures_with_metadata()["jpeg "]
    assert pixels_alone(content[:cut])[:2] == content[:2]
    with pytest.raises(DataError, match=r"x\.jpg: cannot be decoded"):
        decode_bytes(content[:cut], "x.jpg")


def exif_bomb() -> bytes:
    """A JPEG of 40 MB whose EXIF is a resolution of ten million fractions."""
    numbers = 10_000_000
    entry = struct.pack("<HHIIHHII", 0x011A, 3, 2 * numbers, 64, 0x0128, 3, 1, 2)
    body = b"II*\0" + struct.pack("<IH", 8, 2) + entry + bytes(4)
    body = body.ljust(64, b"\0") + b"\x12\x34" * 2 * numbers
    parts = [body[at : at + 65_000] for at in range(0, len(body), 65_000)]
    segments = (b"\xff\xe1" + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in parts)
    good = attacks.encoded("JPEG")
    head = 4 + int.from_bytes(good[4:6], "big")
    return good[:2] + b"".join(segments) + good[head:]


def shared_bytes() -> bytes:
    """A TIFF of 1 MB in which 10,000 entries have the same megabyte."""
    entries = [(1000 + i, 7, 1 << 20, 8) for i in range(10_000)]
    return attacks.tiff(*entries, data=bytes(1 << 20))


def many_bits() -> bytes:
    """A TIFF whose pixels have forty million channels."""
    return attacks.tiff((258, 3, 20_000_000, 8), (277, 3, 1, 1), data=b"\x08\0" * 20_000_000)


def numbers_below() -> bytes:
    """A TIFF with as many numbers in its EXIF, and in the directory that is in that."""
    inner = struct.pack("<HHHIII", 1, 700, 3, 4_000_000, 300, 0)
    outer = struct.pack("<HHHIII", 1, 40965, 4, 1, 8 + 256 + 32, 0)
    data = bytes(256) + outer.ljust(32, b"\0") + inner.ljust(32, b"\0") + b"\1\2" * 4_000_000
    return attacks.tiff((34665, 4, 1, 8 + 256), data=data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (exif_bomb, ""),
        (shared_bytes, "bytes of metadata in "),
        (many_bits, "20,000,008 numbers of metadata, more than MAX_TIFF_VALUES"),
        (numbers_below, "4,000,011 numbers of metadata, more than MAX_TIFF_VALUES"),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
def test_metadata_is_not_made_into_objects(make: Callable[[], bytes], message: str) -> None:
    content = make()
    outcome = bounded(decode_bytes, content, "x.tif", megabytes=len(content) // 2**20 * 3 + 30)
    assert message in outcome.error and bool(message) == bool(outcome.error), outcome.error


def test_many_scans_of_a_large_image() -> None:
    """100 bytes that take milliseconds, ten thousand times."""
    assert 1 < attacks.scans(0).count(b"\xff\xda") < 20
    decode_bytes(attacks.scans(900), "x.jpg")
    with pytest.raises(DataError, match=r"x\.jpg: 10,\d+ scans, more than MAX_SCANS"):
        decode_bytes(attacks.scans(10_000), "x.jpg")


# Linear time


def test_names_of_many_images(tmp_path: Path) -> None:
    """50,000 images take seconds; while the time was quadratic, 8,000 took half a minute."""

    def count() -> int:
        images = [tmp_path / f"{i // 2}.{'png' if i % 2 else 'jpg'}" for i in range(50_000)]
        return len(set(_output_names(images, tmp_path)))

    assert bounded(count).value == 50_000


def test_a_linked_image_is_read(data: Path, tmp_path: Path) -> None:
    """Links within a dataset are its owner's: they lead where they lead, to regular files."""
    shutil.move(data / "images/val/b.png", tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", data / "images/val/b.png")
    assert np.array_equal(FolderDataset(data, "val").read(1)[0], places.pixels())


def test_files_are_closed(data: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(data / "fifo.png")
    for path in (data / "fifo.png", data / "images", data / "images/val/a.png"):
        try:
            decode(path)
        except DataError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
