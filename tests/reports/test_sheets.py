"""Figures 5 and 7 as sheets of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from mcibi_fast.reports import predictions, weight_maps
from mcibi_fast.reports.predictions import prediction_sheet
from mcibi_fast.reports.sheets import Scene
from mcibi_fast.reports.weight_maps import class_weight_sheet, heat, weight_sheet
from mcibi_fast.viz.overlay import fit, grid, legend, mark

PALETTE = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 250]], np.uint8)
CLASSES = ["a", "b", "c"]
INK = (40, 42, 48)


def scene() -> Scene:
    label = np.zeros((64, 64), np.uint8)
    label[32:] = 1
    label[:, :4] = 255
    return Scene("scene <1>", np.full((64, 64, 3), 127, np.uint8), label)


def count(sheet: np.ndarray, colour: tuple[int, ...]) -> int:
    return int((sheet == np.array(colour, np.uint8)).all(-1).sum())


def test_mistaken_pixels_are_hatched_and_no_others() -> None:
    where = np.zeros((40, 40), bool)
    where[10:30, 20:] = True
    before = np.full((40, 40, 3), 200, np.uint8)
    after = mark(before, where)
    changed = (after != before).any(-1)
    assert not changed[~where].any()
    assert 0.2 < changed[where].mean() < 0.5  # the prediction shines through
    assert (before == 200).all()


def test_predictions_with_and_without_mistakes() -> None:
    right = np.where(scene().label == 255, 2, scene().label)  # what has no label cannot be wrong
    wrong = right.copy()
    wrong[:16] = 1
    sheet = np.array(prediction_sheet([scene()], {"m": [right]}, CLASSES, PALETTE))
    marked = np.array(prediction_sheet([scene()], {"m": [wrong]}, CLASSES, PALETTE))
    # A quarter of the picture but its unlabelled strip; hatching is three pixels of eight.
    hatched = count(marked, INK) - count(sheet, INK)
    assert hatched == pytest.approx(64 * 4 * 60 * 4 * 4 // 16 * 3 / 8, rel=0.25)


def test_notes_say_the_share_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}

    def spy(rows, **options):
        seen.update(options)
        return grid(rows, **options)

    monkeypatch.setattr(predictions, "grid", spy)
    monkeypatch.setattr(weight_maps, "grid", spy)
    wrong = scene().label.copy()
    wrong[:16] = 2  # of 64 rows; the unlabelled strip does not count
    prediction_sheet([scene()], {"m": [scene().label], "n": [wrong]}, CLASSES, PALETTE)
    assert seen["columns"] == ["image", "ground truth", "m", "n"]
    assert seen["notes"] == [["scene <1>", "", "100.0 % right", "75.0 % right"]]
    weights = np.where(scene().label == 255, np.nan, 0.25)
    weight_sheet([scene()], {"W": [weights]}, CLASSES, PALETTE)
    assert seen["notes"] == [["scene <1>", "", "mean 0.25"]]


def test_heat_is_dark_at_zero_bright_at_one_and_grey_where_unknown() -> None:
    weights = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32).repeat(2, 0)
    picture = heat(weights)
    low, middle, high, unknown = picture[0, [0, 70, 140, 200]].astype(int)
    assert low.sum() < 20 < low.sum() + middle.sum() < high.sum() + middle.sum()
    assert high.sum() > 550 and unknown.tolist() == [236, 236, 236]


def test_sheets_hold_all_pictures_of_their_kind() -> None:
    weights = np.full((64, 64), 1.0)
    bright = tuple(heat(weights)[0, 0].tolist())
    two = np.array(weight_sheet([scene()], {"one": [weights], "two": [weights]}, CLASSES, PALETTE))
    assert count(two, bright) >= 2 * 256 * 256
    many = np.array(class_weight_sheet(scene(), dict.fromkeys("abc", weights), PALETTE))
    assert count(many, bright) >= 3 * 256 * 256


def test_fit_keeps_values_and_shape() -> None:
    small = np.arange(12, dtype=np.uint8).reshape(3, 4)
    large = fit(small, 16, smooth=False)
    assert large.shape == (12, 16) and np.array_equal(large[::4, ::4], small)
    shrunk = fit(np.kron(small, np.ones((8, 8), np.uint8)), 4, smooth=False)
    assert np.array_equal(shrunk, small)
    checker = (np.indices((64, 64)).sum(0) % 2 * 200).astype(np.uint8)
    assert abs(int(fit(checker, 16, smooth=True).mean()) - 100) <= 1


def test_long_headings_are_broken_and_long_notes_cut() -> None:
    picture = np.zeros((20, 90, 3), np.uint8)
    short = grid([[picture]], columns=["one"], notes=[["n"]])
    long = grid([[picture]], columns=["one two three four five six seven"], notes=[["n" * 99]])
    assert long.width == short.width and long.height > short.height
    with pytest.raises(ValueError, match="notes: expected one for each picture"):
        grid([[picture]], notes=[[]])


def test_legend_fits_the_width_and_explains_the_marks() -> None:
    names = ["class number"] * 3
    narrow, wide = (legend(names, PALETTE, width=width, mistaken=True) for width in (150, 600))
    assert narrow.width <= 160 and wide.width <= 606 and narrow.height > wide.height
    assert count(np.array(wide), INK) > 40


def test_photographs_shrink_and_small_scenes_grow() -> None:
    photo = Scene("p", np.zeros((360, 480, 3), np.uint8), np.zeros((360, 480), np.uint8))
    for shown, side in ((photo, 384), (scene(), 256)):
        sheet = prediction_sheet([shown], {"m": [shown.label]}, CLASSES, PALETTE)
        assert 3 * side <= sheet.width < 3 * side + 40
