"""`mcibi_fast.load`: a trained model that labels pictures of any kind in three lines."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mcibi_fast
from mcibi_fast import cli
from mcibi_fast.data import DataError
from mcibi_fast.models import hub
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import InferenceConfig, NamedData
from mcibi_fast.viz import blend
from tests.tiny_run import make_tiny_config

SPEC = ModelSpec(
    name="fcn_mcibipp",
    backbone="test_resnet",
    options={"feats_channels": 8, "transform_channels": 8},
    classes=[f"part {k}" for k in range(20)],
    palette=[[12 * k, 255 - 12 * k, k] for k in range(20)],
    mean=[0.4, 0.5, 0.6],
    std=[0.2, 0.3, 0.25],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose predictions are of several classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(SPEC).eval()
    with torch.no_grad():
        model.head.decoder.classifier.bias.zero_()
    return hub.save_pretrained(model, SPEC, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """The same model as the best checkpoint of a run on LIP with two scales and mirrored views."""
    model, spec = hub.from_pretrained(folder)
    config = replace(
        make_tiny_config(),
        data=NamedData(name="lip", size=(40, 48)),
        inference=InferenceConfig((0.75, 1.0), flip=True),
        mixed_precision="no",
    )
    best = tmp_path / "run" / "checkpoints" / "best"
    best.mkdir(parents=True)
    (best / "model.safetensors").write_bytes(pack_weights(model, spec))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path / "run"


def pixels(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:height, :width]


def test_labels_are_those_of_the_command(run: Path, tmp_path: Path) -> None:
    """With the run's test size, scales and mirrored classes; and with changes to them."""
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels()).save(photo)
    model = mcibi_fast.load(run, device="cpu")
    assert model.inference == InferenceConfig((0.75, 1.0), flip=True)
    found = []
    for arguments, options in (
        ([], {}),
        (["--scales", "1", "--no-flip"], {"scales": [1.0], "flip": False}),
        (["--stages", "2", "--window", "24,32"], {"stages": 2, "window": (24, 32)}),
    ):
        out = str(tmp_path / f"out{len(found)}")
        assert cli.main(["predict", str(run), str(photo), "--cpu", "--out", out, *arguments]) == 0
        labels = model.predict(photo, **options)
        assert labels.dtype == np.uint8 and labels.shape == (50, 70)
        assert np.array_equal(labels, np.array(Image.open(f"{out}/labels/photo.png")))
        overlay = np.array(Image.open(f"{out}/overlays/photo.png"))
        assert np.array_equal(np.array(model.overlay(photo, labels)), overlay)
        found.append(labels)
    assert len(np.unique(found[0])) > 2
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_pictures_of_every_kind(folder: Path, tmp_path: Path) -> None:
    model = mcibi_fast.load(str(folder), device="cpu")
    colours = pixels()
    expected = model.predict(colours)
    photo = tmp_path / "photo.png"
    Image.fromarray(colours).save(photo)
    for picture in (str(photo), photo, photo.read_bytes(), Image.open(photo), colours.tolist()):
        if isinstance(picture, list):
            picture = np.array(picture, np.uint8)[:, ::-1][:, ::-1]  # not contiguous
        assert np.array_equal(model.predict(picture), expected)
    grey = colours[..., 0]
    assert np.array_equal(model.predict(grey), model.predict(np.stack([grey] * 3, 2)))
    other = pixels(33, 20, seed=1)
    several = model.predict([photo, other])
    assert isinstance(several, list) and np.array_equal(several[0], expected)
    assert np.array_equal(several[1], model.predict(other))
    batch = model.predict(np.stack([colours, colours]))
    assert len(batch) == 2 and np.array_equal(batch[1], expected)
    assert model.predict([]) == []


def test_orientation_is_applied_once(folder: Path, tmp_path: Path) -> None:
    model = mcibi_fast.load(folder, device="cpu")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.png", "turned.jpg", "turned.tif"):
        Image.fromarray(pixels()).save(tmp_path / name, exif=exif)
        expected = model.predict(tmp_path / name)
        assert expected.shape == (70, 50)
        opened = Image.open(tmp_path / name)
        info = dict(opened.info)
        for picture in (opened, opened, (tmp_path / name).read_bytes()):
            assert np.array_equal(model.predict(picture), expected)
        assert {key: opened.info[key] for key in info} == info
        assert model.overlay(opened).size == (50, 70)


def test_pictures_opened_by_pil_are_read_as_files_are(folder: Path, tmp_path: Path) -> None:
    """Grey values of 16 bits are scaled, palettes looked up, alpha dropped."""
    model = mcibi_fast.load(folder, device="cpu")
    grey = (pixels()[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    pictures = [
        Image.fromarray(grey),
        Image.fromarray(pixels()).quantize(16),
        Image.fromarray(np.dstack([pixels(), pixels(seed=2)[..., :1]]), "RGBA"),
        Image.fromarray(pixels()).convert("CMYK"),
    ]
    for number, picture in enumerate(pictures):
        suffix = "tif" if picture.mode == "CMYK" else "png"
        picture.save(tmp_path / f"{number}.{suffix}")
        expected = model.predict(tmp_path / f"{number}.{suffix}")
        assert np.array_equal(model.predict(Image.open(tmp_path / f"{number}.{suffix}")), expected)
        assert np.array_equal(model.predict(picture), expected)


def test_classes_palette_and_overlay(folder: Path) -> None:
    model = mcibi_fast.load(folder, device="cpu")
    assert model.classes == SPEC.classes and model.palette.tolist() == SPEC.palette
    assert repr(model) == "Predictor(fcn_mcibipp, 20 classes, cpu)"
    colours = pixels()
    labels = model.predict(colours)
    expected = blend(colours, labels, model.palette, 0.25)
    assert np.array_equal(np.array(model.overlay(colours, alpha=0.25)), expected)
    assert np.array_equal(colours, pixels())  # the caller's array stays as it is
    with pytest.raises(ValueError, match="label: size"):
        model.overlay(colours, labels[1:])


def test_what_is_no_picture(folder: Path, tmp_path: Path) -> None:
    model = mcibi_fast.load(folder, device="cpu")
    for picture, message in (
        (3, "image: expected a path, .* got int"),
        (pixels().astype(np.float32), r"got an array \(50, 70, 3\) of float32"),
        (pixels()[..., :2], r"got an array \(50, 70, 2\) of uint8"),
    ):
        with pytest.raises(TypeError, match=message):
            model.predict(picture)
    with pytest.raises(TypeError, match="image 1: expected a path"):
        model.predict([pixels(), None])
    for picture in (tmp_path / "none.jpg", "none.jpg", b"", b"no image"):
        with pytest.raises(DataError, match=r"none\.jpg: cannot|image: (empty|cannot be decoded)"):
            model.predict(picture)
    with pytest.raises(ValueError, match="scales: expected positive"):
        model.predict(pixels(), scales=[0])
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor an owner/name"):
        mcibi_fast.load("nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        mcibi_fast.load(tmp_path)


def test_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    model = mcibi_fast.load("owner/name", revision="v1", token="secret", device="cpu")
    assert (asked["repo"], asked["revision"], asked["token"]) == ("owner/name", "v1", "secret")
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "PNG")
    assert np.array_equal(
        model.predict(buffer.getvalue()), mcibi_fast.load(folder, device="cpu").predict(pixels())
    )


def test_precision(folder: Path) -> None:
    """In mixed precision the weights are not folded, as in the command."""
    full, mixed = (mcibi_fast.load(folder, device="cpu", precision=p) for p in ("no", "bf16"))
    assert full.model.precision == "no" and mixed.model.precision == "bf16"
    assert hasattr(mixed.model, "memory") and not hasattr(full.model, "memory")
    with pytest.raises(ValueError, match="precision: expected"):
        mcibi_fast.load(folder, precision="fp8")  # type: ignore[arg-type]
