from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast.data import Scenes
from mcibi_fast.viz import blend, colourise, grid, indexed, legend, to_pixels

PALETTE = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 50]], np.uint8)
LABEL = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)


def test_colourise():
    colours = colourise(LABEL, PALETTE)
    assert np.array_equal(colours[0], PALETTE)
    assert colours[1, 0].tolist() == [236, 236, 236]
    # Other dtypes, tensors, and values that are no class.
    assert np.array_equal(colours, colourise(torch.from_numpy(LABEL).long(), PALETTE))
    odd = np.where(LABEL == 255, -100, LABEL.astype(np.int64))
    assert np.array_equal(colours, colourise(odd, PALETTE))


def test_blend_leaves_unlabelled_pixels():
    image = np.full((2, 3, 3), 100, np.uint8)
    mixed = blend(image, LABEL, PALETTE, alpha=0.5)
    assert mixed[1, 0].tolist() == [100, 100, 100]
    assert mixed[0, 0].tolist() == [150, 50, 50]
    assert mixed[0, 2].tolist() == [50, 50, 75]
    with pytest.raises(ValueError, match=r"label: size \(2, 3\) differs"):
        blend(image[:, :2], LABEL, PALETTE)


def test_indexed_png_holds_the_indices(tmp_path):
    indexed(LABEL, PALETTE).save(tmp_path / "label.png")
    back = Image.open(tmp_path / "label.png")
    assert back.mode == "P"
    assert np.array_equal(np.array(back), LABEL)
    assert np.array_equal(np.array(back.convert("RGB")), colourise(LABEL, PALETTE))


def test_to_pixels_undoes_the_normalisation():
    dataset = Scenes("train", count=1, size=32, seed=0)
    pixels, _ = dataset.read(0)
    assert np.array_equal(to_pixels(dataset[0]["image"], dataset.mean, dataset.std), pixels)


def test_grid_places_every_picture():
    rows = [
        [np.full((8 + i, 10 + j, 3), 40 * i + 20 * j, np.uint8) for j in range(3)] for i in (0, 1)
    ]
    rows[1].pop()
    sheet = np.array(grid(rows, columns=["a", "b", "c"], captions=["first", "second"]))
    for row in rows:
        for picture in row:
            value = picture[0, 0]
            assert (sheet == value).all(-1).sum() >= picture.shape[0] * picture.shape[1]
    bare = grid(rows)
    assert bare.size[1] < sheet.shape[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"columns": ["a"]}, "columns: 1 headings for 2"), ({"captions": []}, "captions: 0 captions")],
)
def test_grid_refuses_what_does_not_fit(options, message):
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        grid([[picture, picture]], **options)
    with pytest.raises(ValueError, match="rows: no pictures"):
        grid([])


def test_legend_shows_every_colour():
    names = ["sky", "a long name", "c"]
    sheet = np.array(legend(names, PALETTE, columns=2))
    for colour in PALETTE:
        assert (sheet == colour).all(-1).sum() > 100


def test_a_row_without_notes_takes_no_line_for_them() -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    rows = [[picture], [picture]]
    heights = [
        grid(rows, notes=notes).height
        for notes in (None, [[""], [""]], [[""], ["a"]], [["a"], ["a"]])
    ]
    assert (
        heights[0] == heights[1] < heights[2] and heights[3] - heights[2] == heights[2] - heights[0]
    )
