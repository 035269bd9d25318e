"""The section "Videos, frame by frame": consecutive frames and their predictions (Figure 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.base import renormalised
from mcibi_fast.data.video import ClipDataset, VideoDataset, source_of
from mcibi_fast.inference.stream import VideoPredictor
from mcibi_fast.models import Segmentor, VideoSegmentor
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.samples import Trained
from mcibi_fast.reports.sheets import FONT, Scene, key, labelled, mistaken
from mcibi_fast.viz.overlay import Pixels, colourise, fit, grid, mark, wrapped

FRAMES = 6
_WIDTH = 224  # of a frame
_LABEL = 140  # of the rows' names


def add_videos(report: Report, trained: Sequence[Trained], dataset: SegmentationDataset) -> None:
    """Adds the section if the dataset has videos: consecutive frames of two of them."""
    followed = [each for each in trained if not each.model.needs_labels]
    if not isinstance(dataset, VideoDataset | ClipDataset) or not followed:
        return
    report.heading("Videos, frame by frame")
    for i, video in enumerate(videos_to_show(dataset), 1):
        frames = middle_frames(dataset, video)
        predictions = {each.name: follow(each.model, dataset, video, frames) for each in followed}
        scenes = read_scenes(dataset, video, frames)
        where = "A third" if i == 1 else "Two thirds"
        report.picture(
            video_sheet(scenes, predictions, dataset.classes, dataset.palette),
            f"Consecutive frames in the middle of {source_of(dataset).videos()[video]}. {where} of "
            "the way through the split, not selected by its results. Under each prediction: the "
            "share of labelled pixels that is right, and the share that flips: among the pixels "
            "whose label is the same as in the frame before, those whose prediction is not. As "
            "Figure 8 of the paper.",
            name="video" if i == 1 else f"video_{i}",
            wide=True,
        )


def videos_to_show(dataset: VideoDataset | ClipDataset) -> list[int]:
    """The numbers of a video a third of the way through the split and of one at two thirds."""
    total = len(source_of(dataset).videos())
    return sorted({total // 3, 2 * total // 3})


def middle_frames(dataset: VideoDataset | ClipDataset, video: int, count: int = FRAMES) -> range:
    """``count`` consecutive frames in the middle of a video, or all if it has fewer."""
    total = source_of(dataset).frames(video)
    first = max(0, (total - count) // 2)
    return range(first, min(first + count, total))


def read_scenes(
    dataset: VideoDataset | ClipDataset, video: int, frames: Sequence[int]
) -> list[Scene]:
    """Frames of a video with their labels; a frame without one has ``ignore_index`` throughout."""
    source = source_of(dataset)
    scenes = []
    for frame in frames:
        pixels, label = source.read_frame(video, frame)
        if label is None:
            label = np.full(pixels.shape[:2], source.ignore_index)
        scenes.append(Scene(f"frame {frame}", pixels, label))
    return scenes


@torch.no_grad()
def follow(
    model: Segmentor, dataset: VideoDataset | ClipDataset, video: int, frames: range
) -> list[NDArray[np.int64]]:
    """The predictions (H, W) of consecutive frames of a video streamed from its beginning.

    Args:
        model: an image or video model in evaluation mode.
        dataset: with the transform of its evaluation.
        video: its number.
        frames: consecutive ones.
    """
    dataset = renormalised(dataset, model.normalisation)
    source, device = source_of(dataset), next(model.parameters()).device
    predictor = VideoPredictor(model)
    # Earlier frames have no influence.
    begin = max(0, frames[0] - (model.reach if isinstance(model, VideoSegmentor) else 0))
    predictions = []
    for frame in range(begin, frames[-1] + 1):
        pixels, _ = source.read_frame(video, frame)
        size = (pixels.shape[0], pixels.shape[1])
        nothing = np.full(size, source.ignore_index, np.uint8)
        image, _ = dataset.transformed(pixels, nothing, frame)
        predictions.append(predictor.predict(image.to(device), size).cpu().numpy())
    return predictions[-len(frames) :]


def video_sheet(
    scenes: Sequence[Scene],
    predictions: Mapping[str, Sequence[NDArray[np.integer]]],
    classes: Sequence[str],
    palette: Pixels,
) -> Image.Image:
    """Frames from left to right: image, ground truth, and a row per model (Figure 8).

    Mistakes are hatched. The note under each prediction is the share of labelled pixels that is
    right and, from the second frame on, the share that flips, see `flips`.

    Args:
        scenes: consecutive frames of one video.
        predictions: for each model's name (H, W) class indices per frame.
        classes: K names; the legend has those that occur.
        palette: (K, 3) uint8.
    """
    K = len(classes)
    rows: list[list[Pixels]] = [
        [_sized(scene.pixels, smooth=True) for scene in scenes],
        [_sized(colourise(scene.label, palette), smooth=False) for scene in scenes],
    ]
    notes = [[""] * len(scenes), [""] * len(scenes)]
    for maps in predictions.values():
        wrong = [mistaken(m, s.label, K) for m, s in zip(maps, scenes, strict=True)]
        rows.append(
            [
                mark(
                    _sized(colourise(m, palette), smooth=False),
                    _sized(w.astype(np.uint8), smooth=False) > 0,
                )
                for m, w in zip(maps, wrong, strict=True)
            ]
        )
        notes.append([_note(i, scenes, maps, wrong[i], K) for i in range(len(scenes))])
    names = ["image", "ground truth", *predictions]
    rows = [[_tile(name, row[0].shape[0]), *row] for name, row in zip(names, rows, strict=True)]
    seen = [scene.label for scene in scenes] + [m for maps in predictions.values() for m in maps]
    occurring = {int(k) for values in seen for k in np.unique(values)}
    width = sum(picture.shape[1] + 6 for picture in rows[0])
    return grid(
        rows,
        columns=["", *(scene.name for scene in scenes)],
        notes=[["", *line] for line in notes],
        title="One video, frame by frame; mistaken pixels are hatched",
        footer=[key(occurring, classes, palette, width=width, hatched=True)],
        font_size=FONT,
    )


def flips(
    predictions: Sequence[NDArray[np.integer]],
    labels: Sequence[NDArray[np.integer]],
    num_classes: int,
) -> float:
    """Among the pixels with the same label in two frames: the share whose prediction differs.

    Args:
        predictions, labels: (H, W) of both frames.
        num_classes: K.

    Returns:
        In [0, 1]; NaN where no pixel's label is the same.
    """
    steady = (labels[0] == labels[1]) & labelled(labels[0], num_classes)
    return (
        float((predictions[0] != predictions[1])[steady].mean()) if steady.any() else float("nan")
    )


def _note(
    i: int,
    scenes: Sequence[Scene],
    maps: Sequence[NDArray[np.integer]],
    wrong: NDArray[np.bool_],
    num_classes: int,
) -> str:
    known = labelled(scenes[i].label, num_classes).sum()
    if not known:
        return "no label"
    text = f"{100 * (1 - wrong.sum() / known):.1f} % right"
    if i == 0:
        return text
    share = flips(maps[i - 1 : i + 1], [scenes[i - 1].label, scenes[i].label], num_classes)
    return text if np.isnan(share) else f"{text}, {100 * share:.1f} % flip"


def _sized(picture: Pixels, *, smooth: bool) -> Pixels:
    return fit(picture, _WIDTH, smooth=smooth)


def _tile(name: str, height: int) -> Pixels:
    """A row's name, as tall as its pictures."""
    font = ImageFont.load_default(FONT)
    tile = Image.new("RGB", (_LABEL, height), (255, 255, 255))
    text = "\n".join(wrapped(name, font, _LABEL - 4))
    ImageDraw.Draw(tile).multiline_text(
        (0, height // 2), text, fill=(40, 42, 48), font=font, anchor="lm", spacing=6
    )
    return np.asarray(tile)
