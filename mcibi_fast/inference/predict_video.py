"""A video to masks and an overlaid video on disk, frame by frame."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcibi_fast.data.base import Transform
from mcibi_fast.defaults import LARGE_WINDOW
from mcibi_fast.errors import and_more, enough_memory
from mcibi_fast.inference.labels import LESS_MEMORY, FlipPairs, windows_for_large
from mcibi_fast.inference.outputs import (
    check_used_folder,
    clear_used_folder,
    save_picture,
    short_name,
)
from mcibi_fast.inference.pictures import Picture, input_size, network_input
from mcibi_fast.inference.stream import VideoPredictor
from mcibi_fast.inference.video_io import ReadFrame, VideoWriter, open_frames
from mcibi_fast.interrupt import deferred_interrupt
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import ModelSpec, Precision
from mcibi_fast.progress import Progress
from mcibi_fast.recipes.parts import InferenceConfig
from mcibi_fast.viz.overlay import blend, indexed


@dataclass
class VideoResult:
    """What `predict_video` did.

    Attributes:
        frames: masks that were written.
        seconds: time that it took, including reading and writing.
        video: the overlaid video, if there is one.
        problems: one line per frame that could not be used.
        ending: see `video_io.Frames`.
        window: the windows that large frames were taken in, if they were.
    """

    frames: int = 0
    seconds: float = 0.0
    video: Path | None = None
    problems: list[str] = field(default_factory=list)
    ending: str = ""
    window: tuple[int, int] | None = None

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0

    def faults(self) -> str:
        """One line about what was not used; "" if all was."""
        found = [self.ending] if self.ending else []
        if self.problems:
            first, count = " ".join(self.problems[0].split()), len(self.problems)
            found.insert(0, f"{count} frames left out: {first}{and_more(count)}")
        return "; ".join(found)


def predict_video(
    model: Segmentor,
    spec: ModelSpec,
    source: str,
    out: str | Path,
    *,
    overlay: bool = True,
    every: int = 1,
    limit: int | None = None,
    inference: InferenceConfig | None = None,
    transform: Transform | None = None,
    flip_pairs: FlipPairs = (),
    large_window: tuple[int, int] | None = LARGE_WINDOW,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> VideoResult:
    """Predicts the frames of a video as a stream; an image model treats each frame separately.

    Writes ``out/labels/FRAME.png`` (palette PNG whose values are the class indices; FRAME is the
    frame's number or the picture's name) and ``out/overlay.mp4``. Frames that cannot be read, or
    have another size than the first one, are left out and noted in the result; the frame before is
    shown for longer. Frames keep their times; those of a camera are when they were read. After
    Ctrl-C or SIGTERM the results so far are kept, and the video ends there. What an earlier video
    left in ``out`` is removed before the first frame is written.

    Args:
        model: a model from `checkpoint.load_model`, folded or not; put into evaluation mode.
        spec: normalisation and palette.
        source: a video file, a folder of pictures, or the number of a camera.
        out: folder for the results, created if needed.
        overlay: also write the overlaid video; needs OpenCV.
        every: take one frame out of this many.
        limit: end after this many frames; None goes to the end.
        inference: the default is one pass over the whole frame.
        transform: transforms each frame before the network, such as a dataset's `EvalTransform`;
            by default the frame is normalised and keeps its size.
        flip_pairs: classes that a mirrored frame swaps.
        large_window: windows for large frames, as in `predict`.
        device: by default the model's device.
        precision: "no", "bf16" or "fp16"; by default that of the model's training.
        progress: show how far it is.

    Raises:
        FileNotFoundError, ValueError: see `open_frames`; or no frame at all could be used, or
            ``inference`` makes no sense or is not for this model; or ``out`` holds other files in
            the results' place.
        TooLittleMemoryError: naming the frame.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, saying what is kept.
        OSError: an output cannot be written; a video that is not whole is removed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    device = torch.device(device if device is not None else next(model.parameters()).device)
    predictor = VideoPredictor(
        model.to(device).eval(), inference, flip_pairs=flip_pairs, precision=precision
    )
    check_used_folder(Path(out), Path(source))
    with closing(open_frames(source, every=every)) as frames:
        writer = VideoWriter(Path(out) / "overlay.mp4", frames.fps) if overlay else None
        job = _Job(predictor, spec, Path(out), writer, transform, device, large_window)
        total = limit if frames.total is None else min(frames.total, limit or frames.total)
        stopped = False
        try:
            with (
                deferred_interrupt() as interrupted,
                Progress("video", unit="frame", total=total, show=progress, leave=True) as shown,
            ):
                for frame in frames:
                    job.take(frame)
                    job.result.seconds = time.perf_counter() - job.start
                    shown.advance()
                    if job.result.frames == limit or interrupted():
                        break
        except KeyboardInterrupt:
            stopped = True
        finally:
            result = job.close(frames.end)
    result.ending = frames.ending
    if stopped:
        done = f"{result.frames} frames are kept in {out}, {result.rate:.1f} frames per second"
        faults = f"; {result.faults()}" if result.faults() else ""
        raise KeyboardInterrupt(f"stopped; {done}{faults}")
    if not result.frames:
        raise ValueError(f"{source}: no frame could be used ({result.faults() or 'it holds none'})")
    return result


class _Job:
    """Predicts the frames one by one and collects the result."""

    def __init__(
        self,
        predictor: VideoPredictor,
        spec: ModelSpec,
        out: Path,
        writer: VideoWriter | None,
        transform: Transform | None,
        device: torch.device,
        large_window: tuple[int, int] | None,
    ) -> None:
        self.predictor, self.spec, self.out, self.writer = predictor, spec, out, writer
        self.transform, self.device, self.large_window = transform, device, large_window
        self.palette = np.array(spec.palette, np.uint8)
        self.result = VideoResult()
        self.start = time.perf_counter()
        self._size: tuple[int, int] | None = None

    @torch.no_grad()
    def take(self, frame: ReadFrame) -> None:
        """Predicts and writes a frame, or notes what is wrong with it."""
        if frame.pixels is None:
            self.result.problems.append(frame.problem)
            return
        size = frame.pixels.shape[0], frame.pixels.shape[1]
        if self._size is not None and self._size != size:
            (height, width), (first_height, first_width) = size, self._size
            self.result.problems.append(
                f"{frame.name}: {width}x{height}, the first frame has {first_width}x{first_height}"
            )
            return
        spec = self.spec
        protocol = self.predictor.inference.protocol
        image = network_input(
            frame.pixels, spec.mean, spec.std, self.transform, self.device, protocol
        )
        if self._size is None:
            self._begin(image)
        self._size = size
        with enough_memory(f"{frame.name}: {size[1]}x{size[0]} pixels", LESS_MEMORY):
            frame_input = image[0] if isinstance(image, Tensor) else image
            label = self.predictor.predict(frame_input, size).cpu().numpy()
            target = self.out / "labels" / short_name(f"{frame.name}.png")
            save_picture(indexed(label, self.palette), target, below=self.out, writer="video")
            if self.writer is not None:
                self.writer.add(blend(frame.pixels, label, self.palette), frame.time)
        self.result.frames += 1

    def _begin(self, image: Picture | Tensor) -> None:
        """What the first frame decides: windows for large ones; and what is no longer needed."""
        clear_used_folder(self.out)
        own = self.predictor.inference
        if self.large_window is not None:
            self.predictor.inference = windows_for_large(own, input_size(image), self.large_window)
        if self.predictor.inference != own:
            self.result.window = self.large_window

    def close(self, end: float | None) -> VideoResult:
        """Finishes the video, whose last frame is shown until ``end``; the result."""
        if self.writer is not None:
            self.writer.close(end)
            self.result.video = self.writer.path if self.result.frames else None
        self.result.seconds = time.perf_counter() - self.start
        return self.result
