"""What image files of all kinds become: pictures of three bands, and masks of indices."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mcibi_fast.data import DataError, FolderDataset, check, pack
from mcibi_fast.data.images import decode_bytes, decode_pixels, mask_indices, read_pixels
from mcibi_fast.data.loading import training_loader
from mcibi_fast.data.notes import Notes
from mcibi_fast.data.shards import ShardedDataset
from mcibi_fast.errors import DataWarning
from mcibi_fast.inference.video_io import FolderFrames
from mcibi_fast.terminal import show_warning

SIZE = (16, 24)
Array = np.ndarray


def colours(seed: int = 0, size: tuple[int, int] = SIZE) -> Array:
    """Coarse blocks, which JPEG changes little."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return small.repeat(8, axis=0).repeat(8, axis=1)


def encode(picture: Image.Image | Array, form: str, orientation: int = 1, **options) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if orientation > 1:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def upright(pixels: Array, orientation: int) -> Array:
    """By PIL."""
    content = encode(pixels, "PNG", orientation)
    return np.array(ImageOps.exif_transpose(Image.open(BytesIO(content))))


def encode_wide(pixels: Array, suffix: str) -> bytes:
    """By OpenCV, which also writes colours of more than 8 bits."""
    return cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


def rewrite(content: bytes, tags: dict[int, int | tuple[int, ...]]) -> bytes:
    """A TIFF with other values of its tags, in a new directory at its end."""
    place = struct.unpack_from("<L", content, 4)[0]
    count = struct.unpack_from("<H", content, place)[0]
    entries = {}
    for i in range(count):
        tag, *rest = struct.unpack_from("<HHLL", content, place + 2 + 12 * i)
        entries[tag] = rest
    extra = b""
    for tag, value in tags.items():
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values)}H", *values)
        where = len(content) + len(extra)
        if len(packed) <= 4:
            where = int.from_bytes(packed.ljust(4, b"\0"), "little")
        else:
            extra += packed
        entries[tag] = [3, len(values), where]
    body = b"".join(struct.pack("<HHLL", tag, *rest) for tag, rest in sorted(entries.items()))
    start = len(content) + len(extra)
    directory = struct.pack("<H", len(entries)) + body + bytes(4)
    return content[:4] + struct.pack("<L", start) + content[8:] + extra + directory


# Orientation

FORMS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF, packed": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(form: str, orientation: int) -> None:
    content = encode(colours(), form.split(",")[0], orientation, **FORMS[form])
    expected = upright(colours(), orientation).astype(int)
    pixels = decode_pixels(content, "x")
    assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= 3


def test_exif_of_big_endian_and_damaged_exif() -> None:
    plain = encode(colours(), "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"

    def with_exif(content: bytes) -> bytes:
        return plain[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + plain[2:]

    turned = decode_pixels(with_exif(exif), "x")
    assert np.array_equal(turned, upright(decode_pixels(plain, "x"), 6))
    for damaged in (exif[:20], exif.replace(b"MM\0*", b"XX\0*"), exif.replace(b"\x06", b"\x09")):
        assert decode_pixels(with_exif(damaged), "x").shape == (*SIZE, 3)


@pytest.fixture
def photo(tmp_path: Path) -> Callable[[int, Array, bytes | None], Path]:
    """Writes a dataset of one photo with EXIF, and its mask."""

    def write(orientation: int, stored: Array, mask: bytes) -> Path:
        for kind in ("images", "labels"):
            (tmp_path / kind / "train").mkdir(parents=True, exist_ok=True)
        content = encode(stored, "JPEG", orientation, **FORMS["JPEG"])
        (tmp_path / "images/train/a.jpg").write_bytes(content)
        (tmp_path / "labels/train/a.png").write_bytes(mask)
        (tmp_path / "classes.txt").write_text("dark\nbright\n")
        return tmp_path

    return write


def bright(pixels: Array) -> Array:
    return (pixels.mean(-1) > 127).astype(np.uint8)


def two_halves() -> Array:
    """Dark, and bright in a corner, which shows each turn."""
    pixels = np.full((*SIZE, 3), 20, np.uint8)
    pixels[:8, :8] = 230
    return pixels


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("annotated", ["upright", "as stored"])
def test_a_mask_fits_its_photo(photo, orientation: int, annotated: str, tmp_path_factory) -> None:
    """Whether its tool looked at EXIF or not is seen from its size."""
    stored = two_halves()
    shown = upright(stored, orientation) if annotated == "upright" else stored
    root = photo(orientation, stored, encode(bright(shown), "PNG"))
    dataset = FolderDataset(root, "train")
    dataset.notes = Notes(aloud=False)
    pixels, label = dataset.read(0)
    assert np.array_equal(label, bright(shown)) and np.array_equal(bright(pixels), label)
    notes = dataset.notes.lines()
    report = check(root, progress=False)
    if annotated == "upright":
        assert not notes and "no problems" in report.text()
    else:
        assert len(notes) == 1 and notes[0].startswith("labels/train/a.png: is not turned as the")
        assert notes[0] in report.text() and "no problems" not in report.text()
    # Packed, it is the same.
    out = tmp_path_factory.mktemp("packed")
    pack(dataset, out, "train", progress=False)
    packed, packed_label = ShardedDataset(out, "train").read(0)
    assert np.array_equal(packed, pixels) and np.array_equal(packed_label, label)


@pytest.mark.parametrize(("orientation", "size"), [(6, (16, 16)), (3, SIZE), (2, SIZE), (4, SIZE)])
def test_a_mask_that_fits_either_way_is_said(photo, orientation: int, size) -> None:
    stored = colours(size=size)
    root = photo(orientation, stored, encode(np.ones(size, np.uint8), "PNG"))
    dataset = FolderDataset(root, "train")
    with pytest.warns(DataWarning, match=r"^images/train/a\.jpg: turned as its EXIF says"):
        pixels, _ = dataset.read(0)
    assert np.abs(pixels - upright(stored, orientation).astype(int)).max() <= 3
    text = check(root, progress=False).text()
    assert "images/train/a.jpg: turned as its EXIF says" in text and "no problems" not in text


def test_a_mask_with_an_orientation_is_turned_by_it(photo) -> None:
    stored = two_halves()
    for form in ("PNG", "TIFF"):
        root = photo(6, stored, encode(bright(stored), form, 6))
        pixels, label = FolderDataset(root, "train").read(0)
        assert pixels.shape[:2] == label.shape == SIZE[::-1]
        assert np.array_equal(bright(pixels), label)


def test_sizes_that_differ_either_way_are_refused(photo) -> None:
    root = photo(6, colours(), encode(np.ones((8, 8), np.uint8), "PNG"))
    with pytest.raises(DataError, match=r"labels/train/a\.png: size 8x8 but images/train/a\.jpg"):
        FolderDataset(root, "train").read(0)


def test_frames_of_a_folder_are_turned(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(encode(colours(), "JPEG", 6))
    (frame,) = FolderFrames(tmp_path)
    assert frame.pixels is not None and frame.pixels.shape == (24, 16, 3)


# More than 8 bits


def ramp(top: float, dtype: type) -> Array:
    return np.linspace(0, top, SIZE[0] * SIZE[1]).reshape(SIZE).astype(dtype)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("bands", [1, 3])
def test_16_bits_are_scaled_by_their_range(suffix: str, bands: int) -> None:
    values = ramp(65535, np.uint16)
    wide = values if bands == 1 else np.stack([values, values[::-1], values[:, ::-1]], -1)
    pixels = decode_pixels(encode_wide(wide, suffix), "x")
    expected = np.rint(np.broadcast_to(wide.reshape(*SIZE, bands), (*SIZE, 3)) / 257)
    # Of colours, PIL takes the high byte.
    assert np.abs(pixels - expected).max() <= (0 if bands == 1 else 1)


def test_big_endian_and_inverted_16_bits() -> None:
    values = ramp(65535, np.uint16)
    big = encode(Image.frombytes("I;16B", SIZE[::-1], values.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(decode_pixels(big, "x")[..., 0], np.rint(values / 257))
    inverted = encode(values, "TIFF", tiffinfo={262: 0})
    assert np.array_equal(decode_pixels(inverted, "x")[..., 0], np.rint((65535 - values) / 257))


def test_fractions_in_0_to_1_are_scaled() -> None:
    values = ramp(1, np.float32)
    pixels = decode_pixels(encode(values, "TIFF"), "x")
    assert np.array_equal(pixels, np.repeat(np.rint(values * 255)[..., None], 3, axis=-1))


def nan() -> Array:
    values = ramp(1, np.float32)
    values[3, 4] = np.nan
    return values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode(ramp(255, np.float32), "TIFF"), "fractions from 0 to 255; save it with 8 or 16"),
        (encode(ramp(1, np.float32) - 0.5, "TIFF"), "fractions from -0.5 to 0.5"),
        (encode(nan(), "TIFF"), "fractions from nan to nan"),
        (encode(ramp(1, np.float32) / 100, "TIFF"), "almost black"),
        (encode(ramp(65535, np.int32), "TIFF"), "signed or 32-bit integers, whose range is not"),
        (rewrite(encode(ramp(127, np.uint8), "TIFF"), {339: 2}), "signed or 32-bit integers"),
        (encode_wide(ramp(4095, np.uint16), ".png"), "almost black"),
        (encode_wide(ramp(255, np.uint16), ".tiff"), "almost black"),
        (encode_wide(np.stack([ramp(4095, np.uint16)] * 3, -1), ".png"), "almost black"),
        (encode_wide(np.stack([ramp(255, np.uint16)] * 3, -1), ".tiff"), "almost black"),
        (encode_wide(np.stack([ramp(1, np.float32)] * 3, -1), ".tiff"), "pixels of a kind that"),
    ],
)
def test_values_of_no_known_range_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^photos/x\.tif: .*{message}.*"):
        decode_pixels(content, "photos/x.tif")


def test_bands_one_after_another() -> None:
    """PIL reads every second byte of them."""
    bands = np.random.default_rng(0).integers(0, 65536, (3 * SIZE[0], SIZE[1]), dtype=np.uint16)
    for dtype, bits in ((np.uint16, 16), (np.uint8, 8)):
        content = encode(bands.astype(dtype), "TIFF")
        start, size = Image.open(BytesIO(content)).tag_v2[273][0], SIZE[0] * SIZE[1] * bits // 8
        planes = {273: tuple(start + i * size for i in range(3)), 279: (size,) * 3}
        kinds = {257: SIZE[0], 258: (bits,) * 3, 262: 2, 277: 3, 278: SIZE[0], 284: 2}
        content = rewrite(content, planes | kinds)
        if bits == 8:
            expected = bands.astype(np.uint8).reshape(3, *SIZE).transpose(1, 2, 0)
            assert np.array_equal(decode_pixels(content, "x"), expected)
        else:
            with pytest.raises(DataError, match=r"^x: a TIFF of more than 8 bits that holds its"):
                decode_pixels(content, "x")


def test_black_is_black() -> None:
    for content in (encode(np.zeros(SIZE, np.uint16), "PNG"), encode(np.zeros(SIZE), "TIFF")):
        assert not decode_pixels(content, "x").any()


# Bands


def multispectral(bands: int) -> bytes:
    """A TIFF of 8 bits whose bands beyond the third are of no named kind."""
    pixels = np.dstack([colours(i)[..., 0] for i in range(bands)])
    options = {277: bands, 258: (8,) * bands, 338: (0,) * (bands - 3), 262: 2}
    grey = Image.fromarray(pixels.reshape(SIZE[0], -1))
    content = bytearray(encode(grey, "TIFF"))
    return rewrite(bytes(content), {256: SIZE[1], **options})


def transparent() -> Image.Image:
    return Image.fromarray(np.dstack([colours(), np.tile(np.uint8([0, 128, 255]), (16, 8))]))


@pytest.mark.parametrize(
    ("content", "dropped"),
    [
        (encode(transparent(), "PNG"), "band 4 (alpha)"),
        (encode(transparent(), "WEBP", lossless=True, exact=True), "band 4 (alpha)"),
        (encode(transparent(), "TIFF"), "band 4 (alpha)"),
        (encode(Image.fromarray(colours()).convert("LA"), "PNG"), "band 2 (alpha)"),
        (encode(Image.fromarray(colours()).convert("PA"), "TIFF"), "band 2 (alpha)"),
        (encode(Image.fromarray(colours()).quantize(8), "PNG", transparency=b"\0\7"),
         "transparency"),
        (encode(Image.fromarray(colours()), "PNG", transparency=(1, 2, 3)), "transparency"),
        (multispectral(4), "band 4"),
        (multispectral(6), "bands 4 to 6"),
    ],
)  # fmt: skip
def test_dropped_bands_are_named_once(content: bytes, dropped: str, recwarn) -> None:
    notes = Notes()
    expected = Image.open(BytesIO(content)).convert("RGB")
    recwarn.clear()
    for name in ("x.png", "y.png"):
        pixels = decode_pixels(content, name, notes)
        assert np.array_equal(pixels, np.array(expected))
    message = f"x.png: {dropped} dropped; its colours are used as they are stored"
    assert [str(each.message) for each in recwarn] == [f"{message} (said once)"]
    assert notes.lines() == [f"{message} (and 1 more)"]


def test_workers_of_all_epochs_say_it_once(
    photo, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", show_warning)
    root = photo(1, colours(), encode(INDICES, "PNG"))
    (root / "classes.txt").write_text("a\nb\nc\n")
    for name in "bcd":
        (root / f"labels/train/{name}.png").write_bytes(encode(INDICES, "PNG"))
        (root / f"images/train/{name}.png").write_bytes(encode(transparent(), "PNG"))
    dataset = FolderDataset(root, "train")
    for epoch in range(2):
        options = {"batch_size": 2, "seed": 0, "epoch": epoch, "workers": 1}
        assert len(list(training_loader(dataset, **options))) == 2
    assert capfd.readouterr().err.count("band 4 (alpha) dropped") == 1
    assert dataset.notes.files("bands") == 6


def test_colours_under_transparent_pixels_are_kept() -> None:
    assert np.array_equal(decode_pixels(encode(transparent(), "PNG"), "x"), colours())


def test_further_pictures_in_a_file_are_named() -> None:
    notes = Notes(aloud=False)
    first, second = (Image.fromarray(colours(seed)) for seed in (0, 1))
    for form in ("TIFF", "PNG"):
        content = encode(first, form, save_all=True, append_images=[second])
        assert np.array_equal(decode_pixels(content, form, notes), colours())
    assert notes.lines() == [
        "TIFF: holds several pictures, of which only the first is used (and 1 more)"
    ]


def test_other_modes_are_converted_without_a_note() -> None:
    grey = Image.new("L", SIZE[::-1], 119)
    colour, notes = grey.convert("RGB"), Notes(aloud=False)
    lab = Image.new("LAB", SIZE[::-1], (128, 128, 128))  # L* = 50 is 119 in sRGB
    pictures = [colour.convert("CMYK"), colour.convert("YCbCr"), colour.quantize(2), grey, lab]
    for picture in pictures:
        pixels = decode_pixels(encode(picture, "TIFF"), picture.mode, notes)
        assert np.abs(pixels.astype(int) - 119).max() <= 2, picture.mode
    assert (decode_pixels(encode(Image.new("1", (9, 5), 1), "PNG"), "1", notes) == 255).all()
    assert not notes.lines()


# Masks

INDICES = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) % 3


def low_bits(bits: int) -> bytes:
    """A grey TIFF of few bits per pixel."""
    spread = np.unpackbits(INDICES[..., None] % 2**bits, axis=-1)[..., -bits:]
    packed = np.packbits(spread.reshape(SIZE[0], -1), axis=-1)
    return rewrite(encode(packed, "TIFF"), {256: SIZE[1], 258: bits, 262: 1})


def palette() -> Image.Image:
    """Its colours are not its indices."""
    picture = Image.fromarray(INDICES)
    picture.putpalette([255, 255, 255, 0, 0, 0, 9, 99, 255])
    return picture


@pytest.mark.parametrize(
    "content",
    [
        encode(INDICES, "PNG"),
        encode(INDICES, "BMP"),
        encode(INDICES, "TIFF", compression="tiff_lzw"),
        encode(INDICES.astype(np.uint16), "PNG"),
        encode(INDICES.astype(np.int32), "TIFF"),
        encode(Image.frombytes("I;16B", SIZE[::-1], INDICES.astype(">u2").tobytes()), "TIFF"),
        encode(palette(), "PNG"),
        encode(palette(), "PNG", transparency=0),
        encode(palette(), "TIFF"),
        low_bits(4),
        low_bits(2),
    ],
)
def test_masks_of_all_kinds_are_indices(content: bytes) -> None:
    assert np.array_equal(mask_indices(decode_bytes(content, "x"), "x"), INDICES)


def test_masks_of_one_bit() -> None:
    for form in ("PNG", "TIFF", "BMP"):
        content = encode(Image.fromarray(INDICES == 1), form)
        assert np.array_equal(mask_indices(decode_bytes(content, "x"), "x"), INDICES == 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode(INDICES, "JPEG"), "a mask in lossy compression, which changes class indices"),
        (encode(INDICES, "TIFF", compression="jpeg"), "a mask in lossy compression"),
        (encode(INDICES, "WEBP"), r"a colour mask \(RGB\)"),
        (encode(np.stack([INDICES] * 3, -1), "PNG"), r"a colour mask \(RGB\)"),
        (encode(Image.fromarray(INDICES).convert("LA"), "PNG"), r"a colour mask \(LA\)"),
        (encode(Image.fromarray(INDICES).convert("PA"), "TIFF"), r"a colour mask \(PA\)"),
        (encode(INDICES.astype(np.float32), "TIFF"), "a mask of fractions"),
    ],
)
def test_other_masks_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^labels/a\.png: {message}"):
        mask_indices(decode_bytes(content, "labels/a.png"), "labels/a.png")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_negative_labels_stay_negative(dtype: type, photo) -> None:
    """-1 in 8 bits would be 255, which is ignored."""
    indices = INDICES.astype(dtype)
    indices[2, 3] = -1
    bits = indices.dtype.itemsize * 8
    unsigned = indices.view(f"u{bits // 8}") if bits < 32 else indices
    content = rewrite(encode(unsigned, "TIFF"), {339: 2, 258: bits})
    root = photo(1, colours(), content)
    (root / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"^labels/train/a\.png: label -1 with 3 classes; use 0"):
        FolderDataset(root, "train").read(0)
    assert any("label -1" in line for line in check(root, progress=False).problems)


def test_one_reader_for_files_and_contents(tmp_path: Path) -> None:
    content = encode(ramp(65535, np.uint16), "PNG", 6)
    (tmp_path / "x.png").write_bytes(content)
    assert np.array_equal(read_pixels(tmp_path / "x.png"), decode_pixels(content, "x"))
