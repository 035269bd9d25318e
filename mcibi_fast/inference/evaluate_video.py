"""Evaluation over videos: each frame is computed once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mcibi_fast.data.base import renormalised
from mcibi_fast.data.loading import carried, loader_processes, seeded_generator, value_or_error
from mcibi_fast.data.transforms import under_protocol
from mcibi_fast.data.video import ClipDataset, VideoDataset, source_of
from mcibi_fast.errors import enough_memory
from mcibi_fast.inference.labels import LESS_MEMORY
from mcibi_fast.inference.passes import Place, evaluation_pass, place_of
from mcibi_fast.inference.stream import VideoPredictor
from mcibi_fast.interrupt import leave_to_parent
from mcibi_fast.metrics import FlowFunction, VideoMetrics, default_flow
from mcibi_fast.metrics.temporal import TC_VIDEOS
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import Precision
from mcibi_fast.recipes.parts import InferenceConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate_videos(
    model: Segmentor,
    dataset: VideoDataset | ClipDataset,
    *,
    protocol: str = "vspw2021",
    windows: Sequence[int] = (8, 16),
    flow: FlowFunction | Literal["given"] | None = None,
    max_videos: int | None = TC_VIDEOS,
    inference: InferenceConfig | None = None,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    progress: bool = False,
    interrupted: Callable[[], bool] | None = None,
) -> VideoMetrics:
    """mIoU, pixel and mean class accuracy, TC and VC_n of a model over a split's videos.

    Every frame goes through the model once, as a stream (an image model treats each separately).
    Each of n ranks takes every n-th video as a whole, so each video counts once and the result does
    not depend on n.

    Args:
        model: an image or video model without its DistributedDataParallel wrapper; it is in
            evaluation mode meanwhile and back in its own mode afterwards.
        dataset: the videos. Of clips, their source under their transform. They are normalised as
            the model expects (`Segmentor.normalisation`), and resized to their test size by the
            protocol that ``inference`` names.
        protocol: "vspw2021" or "strict"; see `VideoMetrics`, also for ``windows``, ``max_videos``.
        flow: the flow for TC: a function that estimates it, or "given" for the dataset's own
            (`MovingScenes`); None leaves TC out.
        inference: the default is one pass over the whole frame.
        workers: loader processes.
        accelerator: gives the processes of a distributed run, and its mixed precision if it has
            one.
        device: used without an accelerator; by default the model's device.
        precision: "no", "bf16" or "fp16"; by default the accelerator's, or else that of the model's
            training (``model.precision``).
        progress: show how far it is (on the main process only).
        interrupted: asked after each frame; true ends the evaluation.

    Returns:
        The counts of all ranks; ``compute()`` gives the scores.

    Raises:
        KeyboardInterrupt: ``interrupted`` said so.
        ValueError: the model has other classes than the dataset, the dataset has no flow to give,
            ``inference`` makes no sense or is not for this model, the model takes labels for W,
            processes have different flows, or what a bad file raises.
    """
    inference = inference or InferenceConfig()
    dataset = renormalised(dataset, getattr(model, "normalisation", None))
    dataset = under_protocol(dataset, inference.protocol)
    place = place_of(model, accelerator, device, precision)
    videos = range(place.rank, len(source_of(dataset).videos()), place.world_size)
    frames = _Frames(dataset, videos, flow)
    metrics = VideoMetrics(
        len(dataset.classes),
        protocol=protocol,
        windows=windows,
        flow=flow,
        max_videos=max_videos,
        ignore_index=dataset.ignore_index,
    )
    if metrics.tc is not None:
        metrics.tc.check_ranks(accelerator)
    predictor = VideoPredictor(
        model, inference, flip_pairs=dataset.flip_pairs, precision=place.precision
    )
    with evaluation_pass(
        model, place, total=len(frames), unit="frame", progress=progress, interrupted=interrupted
    ) as done:
        for frame in _load(frames, workers):
            if frame["frame"] == 0:
                predictor.reset()
                metrics.start(frame["video"])
            _count(metrics, predictor, frame, place)
            done(1)
    return metrics.reduce(accelerator)


def gives_flow(dataset: VideoDataset | ClipDataset) -> bool:
    """Whether the frames come with their exact flow."""
    return hasattr(source_of(dataset), "flow")


def usual_flow(
    dataset: VideoDataset | ClipDataset, device: torch.device | str
) -> FlowFunction | Literal["given"]:
    """The dataset's own flow, or `metrics.default_flow` for frames as large as the first one.

    Raises ValueError when there is none, or what a bad file raises.
    """
    if gives_flow(dataset):
        return "given"
    height, width = source_of(dataset).read_frame(0, 0)[0].shape[:2]
    return default_flow(device, (height, width))


def _count(
    metrics: VideoMetrics, predictor: VideoPredictor, frame: dict[str, Any], place: Place
) -> None:
    height, width = frame["pixels"].shape[1:]
    label, flow, device = frame["label"], frame["flow"], place.device
    memory = enough_memory(f"{frame['name']}: {width}x{height} pixels", LESS_MEMORY)
    try:
        # Autocast is of the model alone: the flow is the same in any precision.
        with memory, place.autocast():
            prediction = predictor.predict(frame["image"].to(device), (height, width))
        metrics.update(
            prediction,
            None if label is None else label.to(device),
            image=None if metrics.tc is None else frame["pixels"].to(device),
            flow=None if flow is None else flow.to(device),
        )
    except ValueError as error:
        raise ValueError(f"{frame['name']}: {error}") from error


class _Frames(Dataset):
    """The frames of some videos in order; an error is returned as a value, see `loading`."""

    def __init__(
        self,
        dataset: VideoDataset | ClipDataset,
        videos: Sequence[int],
        flow: FlowFunction | Literal["given"] | None,
    ) -> None:
        self.dataset, self.source = dataset, source_of(dataset)
        self.numbers = [(v, f) for v in videos for f in range(self.source.frames(v))]
        self.gives_flow = flow == "given"
        if self.gives_flow and not gives_flow(dataset):
            raise ValueError(
                f"flow: {type(self.source).__name__} does not provide it; pass a function that "
                "estimates it (metrics.default_flow())"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any] | Exception:
        video, frame = self.numbers[index]
        return value_or_error(
            lambda: self._read(video, frame), lambda: self.source.frame_name(video, frame)
        )

    def _read(self, video: int, frame: int) -> dict[str, Any]:
        pixels, mask = self.source.read_frame(video, frame)
        unlabelled = np.full(pixels.shape[:2], self.source.ignore_index, np.uint8)
        image, label = self.dataset.transformed(pixels, unlabelled if mask is None else mask, frame)
        flow = None
        if self.gives_flow and frame > 0:
            source: Any = self.source
            flow = torch.from_numpy(source.flow(video, frame - 1))
        return {
            "video": video,
            "frame": frame,
            "name": self.source.frame_name(video, frame),
            "image": image,
            "label": None if mask is None else label,
            "pixels": torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0))),
            "flow": flow,
        }


def _load(frames: _Frames, workers: int) -> Iterator[dict[str, Any]]:
    loader: DataLoader = DataLoader(
        frames,
        batch_size=None,
        num_workers=loader_processes(workers),
        worker_init_fn=leave_to_parent,
        generator=seeded_generator(0),
    )
    return carried(loader)
