"""Outputs never become inputs, and replace nothing but earlier outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.inference.outputs import save_picture, short_name, writer_of
from mcibi_fast.inference.predict import predict
from mcibi_fast.inference.predict_video import predict_video
from tests.inference.test_predict import SPEC, DarkOrBright, halves


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_pictures_carry_a_mark_and_stay_valid(tmp_path: Path) -> None:
    save_picture(halves(8, 6), tmp_path / "a.png", below=tmp_path)
    save_picture(halves(8, 6), tmp_path / "v.png", below=tmp_path, writer="video")
    halves(8, 6).save(tmp_path / "own.png")
    (tmp_path / "short.png").write_bytes(b"x")
    os.symlink("nowhere", tmp_path / "link.png")
    found = {path.stem: writer_of(path) for path in tmp_path.iterdir()}
    assert found == {"a": "predict", "v": "video", "own": None, "short": None, "link": None}
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert np.array_equal(np.array(picture), np.array(halves(8, 6)))
        assert picture.text == {"Software": "mcibi-fast predict"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("out", [".", "predictions", "a", "x/y"])
def test_repeated_runs_in_the_source_folder(out: str, tmp_path: Path) -> None:
    for name in ("a.png", "x/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        halves(16, 16).save(tmp_path / name)
    counts = []
    for folder in (out, out, "second"):
        result = predict(DarkOrBright(), SPEC, tmp_path, tmp_path / folder)
        counts.append((len(result.written), result.left_out))
    assert counts == [(2, 0), (2, 4), (2, 4)]


def test_a_folder_of_predictions_alone(tmp_path: Path) -> None:
    halves(16, 16).save(tmp_path / "a.png")
    predict(DarkOrBright(), SPEC, tmp_path / "a.png", tmp_path / "out")
    with pytest.raises(ValueError, match="holds only pictures that mcibi-fast wrote"):
        predict(DarkOrBright(), SPEC, tmp_path / "out", tmp_path / "again")
    named = tmp_path / "out" / "overlays" / "a.png"  # whoever names one means it
    assert len(predict(DarkOrBright(), SPEC, named, tmp_path / "again").written) == 1


def test_masks_are_not_overwritten(tmp_path: Path) -> None:
    """The layout of a dataset: images/SPLIT and labels/SPLIT under one root."""
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
        halves(16, 16).save(tmp_path / kind / "val" / "a.png")
    before = files_in(tmp_path)
    arguments = (DarkOrBright(), SPEC, tmp_path / "images", tmp_path)
    with pytest.raises(ValueError, match=r"labels/val/a.png is already there, and is no pred"):
        predict(*arguments)
    assert files_in(tmp_path) == before
    result = predict(*arguments, overwrite=True, overlays=False)
    assert writer_of(result.written[0]) == "predict"
    assert result.written == [tmp_path / "labels" / "val" / "a.png"]
    assert predict(*arguments).written == result.written  # its own may be replaced


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    halves(16, 16).save(tmp_path / "labels" / "a.png")
    before = files_in(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"labels/a.png is one of the inputs"):
            predict(DarkOrBright(), SPEC, tmp_path / "labels", tmp_path, overwrite=overwrite)
    assert files_in(tmp_path) == before


def test_names_of_up_to_255_bytes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    stems = ["x" * 251, "é" * 125]
    for stem in stems:
        for suffix in (".png", ".jpg"):  # two of one stem become NAME.png.png and NAME.jpg.png
            halves(16, 16).save(source / f"{stem}{suffix}")
    result = predict(DarkOrBright(), SPEC, source, tmp_path / "out")
    names = {path.name for path in result.written}
    assert len(names) == 4 and all(len(os.fsencode(name)) <= 255 for name in names)
    assert all(path.is_file() for path in result.written)
    assert short_name("a.png") == "a.png"
    assert short_name("y" * 300) != short_name("y" * 301)
    assert len(short_name("a." + "b" * 400)) <= 255


def frames(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        halves(16, 16).save(folder / f"{folder.name}{i}.jpg")
    return folder


Video = Callable[..., Path]


@pytest.fixture
def video(tmp_path: Path) -> Video:
    def run(source: Path, out: Path) -> Path:
        predict_video(DarkOrBright(), SPEC, str(source), out, overlay=False)  # type: ignore[arg-type]
        return out

    return run


def test_a_videos_folder_holds_one_film(video: Video, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, count in (("long", 3), ("short", 2)):
        video(frames(tmp_path / name, count), out)
        found = sorted(path.name for path in (out / "labels").iterdir())
        assert found == [f"{name}{i}.png" for i in range(count)]
    (out / "overlay.mp4").write_bytes(b"of an earlier film")
    video(tmp_path / "long", out)
    assert not (out / "overlay.mp4").exists()


def test_other_files_in_a_videos_folder_stay(video: Video, tmp_path: Path) -> None:
    film, out = frames(tmp_path / "film", 2), tmp_path / "out"
    video(film, out)
    halves(4, 4).save(out / "labels" / "mine.png")
    before = files_in(out)
    with pytest.raises(ValueError, match=r"labels/mine.png is already there, and is of no earl"):
        video(film, out)
    assert files_in(out) == before
    with pytest.raises(ValueError, match=r"out: .*labels is the source"):
        video(out / "labels", out)
    predict(DarkOrBright(), SPEC, film, tmp_path / "maps")
    with pytest.raises(ValueError, match="is of no earlier video"):
        video(film, tmp_path / "maps")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "overlay.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"overlay.mp4 is already there"):
        video(film, tmp_path / "other")


def test_a_broken_source_leaves_the_earlier_film(video: Video, tmp_path: Path) -> None:
    out = video(frames(tmp_path / "film", 2), tmp_path / "out")
    before = files_in(out)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no frame could be used"):
        video(tmp_path / "bad", out)
    assert files_in(out) == before
