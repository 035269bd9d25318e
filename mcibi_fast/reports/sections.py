"""The sections of a run's report; each adds its heading, its text and its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.video import ClipDataset, VideoDataset, source_of
from mcibi_fast.models import Segmentor
from mcibi_fast.reports.comparison import Scene, class_weight_sheet, prediction_sheet, weight_sheet
from mcibi_fast.reports.curves import (
    History,
    class_bars,
    memory_chart,
    memory_over_time,
    png,
    training_curves,
)
from mcibi_fast.reports.embedding import MIN_VECTORS, Space, embedding_chart
from mcibi_fast.reports.gathering import (
    collect,
    context_of,
    gather,
    gaussian_memory_of,
    model_input,
    weight_of_class,
    weight_of_truth,
)
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.video_strip import (
    film_sheet,
    follow,
    middle_frames,
    read_scenes,
    videos_to_show,
)
from mcibi_fast.viz.overlay import fit, to_pixels

EMBEDDED_IMAGES = 60
_CLASS_MAPS = 10  # of one image, at most


@dataclass(frozen=True)
class Trained:
    """A model to draw.

    Attributes:
        name: as the report calls it.
        model: in evaluation mode.
        history: of its run.
    """

    name: str
    model: Segmentor
    history: History = ()


class Samples:
    """Samples of a split at even distances, not chosen by any result.

    Args:
        dataset: with its evaluation's transform.
        count: how many, at most.
    """

    def __init__(self, dataset: SegmentationDataset, count: int) -> None:
        self.dataset = dataset
        self.indices = spread(len(dataset), count)
        self.labels: list[Tensor] = []
        self.scenes: list[Scene] = []
        for sample in (dataset[index] for index in self.indices):
            label = sample["label"]
            pixels = to_pixels(sample["image"], dataset.mean, dataset.std)
            if pixels.shape[:2] != label.shape:  # tested at another size than its own
                pixels = fit(pixels, label.shape[1], smooth=True)
            self.labels.append(label)
            self.scenes.append(Scene(sample["name"], pixels, label.numpy()))

    def inputs(self, model: Segmentor) -> Iterator[Tensor]:
        """Each sample as this model takes it, see `model_input`."""
        return (model_input(model, self.dataset, index) for index in self.indices)


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices at even distances, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int)).tolist()


def add_scores(
    report: Report, classes: Sequence[str], ious: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """IoU per class.

    Args:
        report: added to.
        classes: K names.
        ious: for each model's name, per run K fractions (NaN: no such class).
    """
    report.heading("IoU per class")
    several = max(len(runs) for runs in ious.values()) > 1
    whiskers = " Bars: means; whiskers: smallest and largest over seeds." if several else ""
    report.picture(
        png(class_bars(classes, ious)),
        "Intersection over union of each class on the validation split, in percent." + whiskers,
        name="classes",
    )


def add_curves(report: Report, histories: Mapping[str, Sequence[History]]) -> None:
    """Training curves, for each model's name those of its runs."""
    report.heading("Training")
    report.picture(
        png(training_curves(histories)),
        "mIoU on the validation split, learning rate, and the loss with its weighted terms. The "
        "sums do not compare where one model has more terms than the other; single terms do.",
        name="curves",
        wide=True,
    )


def add_predictions(report: Report, trained: Sequence[Trained], samples: Samples) -> None:
    """Image, ground truth and predictions (Figure 5 of the paper)."""
    dataset = samples.dataset
    predictions = {
        each.name: [
            _predicted(each.model, image, label)
            for image, label in zip(samples.inputs(each.model), samples.labels, strict=True)
        ]
        for each in trained
    }
    report.heading("Predictions")
    report.picture(
        prediction_sheet(samples.scenes, predictions, dataset.classes, dataset.palette),
        "Images at even distances through the split, not chosen by the result. Colours are the "
        "predicted classes; hatched pixels are mistaken. Under each prediction: the share of "
        "labelled pixels that is right. As Figure 5 of the paper.",
        name="predictions",
        wide=True,
    )


def _predicted(model: Segmentor, image: Tensor, label: Tensor) -> NDArray[np.int64]:
    device = next(model.parameters()).device
    seen = gather(model, image.to(device), label[None].to(device))
    size = (label.shape[0], label.shape[1])
    return ops.upsample_argmax(seen.output.logits, size)[0].cpu().numpy()


def add_film(report: Report, trained: Sequence[Trained], dataset: SegmentationDataset) -> None:
    """Frames of two videos (Figure 8 of the paper), of a dataset of videos."""
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
            film_sheet(scenes, predictions, dataset.classes, dataset.palette),
            f"Consecutive frames in the middle of {source_of(dataset).videos()[video]}. {where} of "
            "the way through the split, not chosen by the result. Under each prediction: the share "
            "of labelled pixels that is right; and of the pixels whose label is that of the frame "
            "before, the share whose prediction is another (flip). As Figure 8 of the paper.",
            name="video" if i == 1 else f"video_{i}",
            wide=True,
        )


def add_weights(report: Report, trained: Sequence[Trained], samples: Samples) -> None:
    """Where each pixel gathers (Figure 7 of the paper), for the models that gather."""
    gathering = [each for each in trained if context_of(each.model) is not None]
    if not gathering:
        return
    report.heading("What the pixels gather")
    report.text(
        "Each pixel gathers the classes' dataset-level representations with weights W that sum to "
        "one (Eq. 12). Bright: the pixel gathers mostly from the class it belongs to. In the "
        "second stage of iterative inference (section 3.5) W also follows the first prediction."
    )
    dataset = samples.dataset
    for each in gathering:
        stages = _weights_of_stages(each.model, samples)
        names = ("W of the right class, stage 1", "W of the right class, stage 2")
        weights = {
            name: [
                weight_of_truth(logits, label).cpu().numpy()
                for logits, label in zip(stage, samples.labels, strict=True)
            ]
            for name, stage in zip(names, stages, strict=True)
        }
        report.picture(
            weight_sheet(samples.scenes, weights, dataset.classes, dataset.palette),
            f"{each.name}: the weight of the right class at every pixel, and its mean, as Figure 7 "
            "of the paper.",
            name="weights",
            wide=True,
        )
        _add_class_weights(report, each.name, stages[0], samples)


def _add_class_weights(
    report: Report, name: str, weight_logits: Sequence[Tensor], samples: Samples
) -> None:
    """W of every class of the image with most of them."""
    classes = samples.dataset.classes
    present = [
        [k for k in label.unique().tolist() if 0 <= k < len(classes)] for label in samples.labels
    ]
    richest = max(range(len(present)), key=lambda i: len(present[i]))
    size = samples.labels[richest].shape
    maps = {
        classes[k]: weight_of_class(weight_logits[richest], k, (size[0], size[1])).cpu().numpy()
        for k in present[richest][:_CLASS_MAPS]
    }
    report.picture(
        class_weight_sheet(samples.scenes[richest], maps, samples.dataset.palette),
        f"{name}: the weights of the classes in one image, at every pixel, first stage.",
        name="class_weights",
        wide=True,
    )


def _weights_of_stages(model: Segmentor, samples: Samples) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of W (K, h, w) per sample, of the first and of the second stage."""
    device = next(model.parameters()).device
    stages: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image, label in zip(samples.inputs(model), samples.labels, strict=True):
        seen = gather(model, image.to(device), label[None].to(device), stages=2)
        for stage, logits in zip(stages, seen.weight_logits, strict=True):
            stage.append(logits[0])
    return stages


def add_features(
    report: Report,
    trained: Sequence[Trained],
    dataset: SegmentationDataset,
    *,
    count: int = EMBEDDED_IMAGES,
    progress: bool = False,
) -> None:
    """Per-image class vectors before and after the context (Figure 6 of the paper)."""
    indices = spread(len(dataset), count)
    spaces = []
    for each in trained:
        found = collect(each.model, dataset, indices, progress=progress)
        if found.R_aug is None:
            spaces.append(Space(f"{each.name}\nR", found.classes, found.R))
            continue
        spaces += [
            Space(f"{each.name}\nR, before the context", found.classes, found.R, found.C_dl),
            Space(f"{each.name}\nR_aug, after the context", found.classes, found.R_aug),
        ]
    report.heading("Features")
    if min(len(space.classes) for space in spaces) < MIN_VECTORS:
        report.text(f"Too few images for t-SNE: it takes {MIN_VECTORS} vectors, one per class.")
        return
    stars = any(space.stars is not None for space in spaces)
    report.text(
        "A dot is the mean of the features of one class in one image: R, the pixel "
        "representations (Eq. 1), and R_aug, augmented with the dataset-level context (Eq. 4). "
        "Classes are well separated where colours lie apart. The silhouette says the same as a "
        "number, measured before t-SNE: 1 is apart and compact, 0 overlapping."
        + (
            " A star is a class's dataset-level representation, drawn from its Gaussian in the "
            "memory (Eq. 11). It has the mean and the deviation of the class over the channels, "
            "but each channel is drawn at random, so that stars need not lie among their dots."
            if stars
            else ""
        )
    )
    report.picture(
        png(embedding_chart(spaces, dataset.classes, dataset.palette)),
        f"t-SNE of per-image class vectors of {len(indices)} images, as Figure 6 of the paper. "
        "Each panel is a projection of its own: positions do not compare between panels.",
        name="features",
        wide=True,
    )


def add_memory(report: Report, trained: Sequence[Trained], dataset: SegmentationDataset) -> None:
    """What the memory holds, and how it came there, for the models that have one."""
    remembering = [
        (each, memory) for each in trained if (memory := gaussian_memory_of(each.model)) is not None
    ]
    if not remembering:
        return
    report.heading("What the memory holds")
    for each, memory in remembering:
        report.picture(
            png(memory_chart(memory.memory.cpu().numpy(), dataset.classes, dataset.palette)),
            f"{each.name}: mean and standard deviation that represent each class (Eqs. 6-9).",
            name="memory",
        )
        chart = memory_over_time(each.history, dataset.classes, dataset.palette)
        if chart is not None:
            report.picture(
                png(chart),
                f"{each.name}: the same two numbers of each class at the end of every epoch.",
                name="memory_over_time",
                wide=True,
            )
