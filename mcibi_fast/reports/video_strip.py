"""Figure 8: frames of one video, their labels, and what image and video models make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mcibi_fast.data.video import ClipDataset, VideoDataset, source_of
from mcibi_fast.inference.stream import VideoPredictor
from mcibi_fast.models import Segmentor, VideoSegmentor
from mcibi_fast.reports.comparison import Scene, key, mistaken
from mcibi_fast.viz.overlay import Pixels, colourise, fit, grid, mark, wrapped

FRAMES = 6
_WIDTH = 224  # of a frame
_LABEL = 140  # of the rows' names
_FONT = 18


def videos_to_show(dataset: VideoDataset | ClipDataset) -> list[int]:
    """A video a third of the way through the split, and one two thirds."""
    total = len(source_of(dataset).videos())
    return sorted({total // 3, 2 * total // 3})


def middle_frames(dataset: VideoDataset | ClipDataset, video: int, count: int = FRAMES) -> range:
    """So many consecutive frames in a video's middle, or as many as it has."""
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
    """The predictions (H, W) of consecutive frames, as of the stream from the video's beginning.

    Args:
        model: an image or video model in evaluation mode.
        dataset: with its evaluation's transform.
        video: its number.
        frames: consecutive ones.
    """
    source, device = source_of(dataset), next(model.parameters()).device
    predictor = VideoPredictor(model)
    # What a frame sees goes back no further.
    begin = max(0, frames[0] - (model.history if isinstance(model, VideoSegmentor) else 0))
    predictions = []
    for frame in range(begin, frames[-1] + 1):
        pixels, _ = source.read_frame(video, frame)
        size = (pixels.shape[0], pixels.shape[1])
        nothing = np.full(size, source.ignore_index, np.uint8)
        image, _ = dataset.transformed(pixels, nothing, frame)
        predictions.append(predictor.predict(image.to(device), size).cpu().numpy())
    return predictions[-len(frames) :]


def film_sheet(
    scenes: Sequence[Scene],
    predictions: Mapping[str, Sequence[NDArray[np.integer]]],
    classes: Sequence[str],
    palette: Pixels,
) -> Image.Image:
    """Frames from left to right: image, ground truth, and a row per model (Figure 8).

    Mistaken pixels are hatched. Under each prediction stand the share of labelled pixels that is
    right, and from the second frame on that of flips, see `flips`.

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
        font_size=_FONT,
    )


def flips(
    predictions: Sequence[NDArray[np.integer]],
    labels: Sequence[NDArray[np.integer]],
    num_classes: int,
) -> float:
    """Of the pixels whose label is the same in two frames, the share whose prediction is not.

    Args:
        predictions, labels: (H, W) of both frames.
        num_classes: K.

    Returns:
        In [0, 1]; NaN where no pixel's label is the same.
    """
    steady = (labels[0] == labels[1]) & (labels[0] >= 0) & (labels[0] < num_classes)
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
    labelled = np.isin(scenes[i].label, np.arange(num_classes)).sum()
    if not labelled:
        return "no label"
    text = f"{100 * (1 - wrong.sum() / labelled):.1f} % right"
    if i == 0:
        return text
    share = flips(maps[i - 1 : i + 1], [scenes[i - 1].label, scenes[i].label], num_classes)
    return text if np.isnan(share) else f"{text}, {100 * share:.1f} % flip"


def _sized(picture: Pixels, *, smooth: bool) -> Pixels:
    return fit(picture, _WIDTH, smooth=smooth)


def _tile(name: str, height: int) -> Pixels:
    """A row's name, as tall as its pictures."""
    font = ImageFont.load_default(_FONT)
    tile = Image.new("RGB", (_LABEL, height), (255, 255, 255))
    text = "\n".join(wrapped(name, font, _LABEL - 4))
    ImageDraw.Draw(tile).multiline_text(
        (0, height // 2), text, fill=(40, 42, 48), font=font, anchor="lm", spacing=6
    )
    return np.asarray(tile)
