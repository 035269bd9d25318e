"""The cost of Video-MCIBI++: ``python -m benchmarks.bench_video [--quick]``.

attention  the contexts of the h + 1 frames of a clip (C_dl, aggregation, attention), K = 124
           separate: one call for each frame; ours: all frames in one call
frame      one frame of a video, ResNet-50 UperNet, K = 124
           image: the image model; clip: the video model on the clip of h + 1 frames
           ours: the video model as a stream (`inference.stream`); folded: the same with
           ``model.fold()``
stream     1,000 frames (200 on a GPU), ResNet-18 UperNet at 256x256, alternating with the image
           model: frames per second, and by how much the process's memory grew over the last nine
           tenths of the frames

`mcibi_fast.models.counting` counts the ``multiply_adds``.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case
from benchmarks.harness import command_line, nbytes, randn, run_cases, seeded
from benchmarks.machine import resident
from benchmarks.results import Result, Row, result_of
from mcibi_fast import models
from mcibi_fast.inference.stream import VideoStream
from mcibi_fast.models.counting import count
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory

K, HISTORY, BACKBONE = 124, 2, "resnet50"


def attention_case(
    size: int, form: str, direction: str, device: str, *, batch: int = 1, Z: int = 512
) -> Case:
    """The contexts of a clip, without dropout and fresh noise, which would differ."""
    memory = GaussianMemory(K, Z, noise="fixed")
    memory.memory.copy_(torch.stack([randn(K, device="cpu"), randn(K, device="cpu").abs()], 1))
    context: DatasetLevelContext = seeded(
        DatasetLevelContext, memory, transform_channels=Z // 2, projections=form
    )
    context = context.to(device).eval()  # batch statistics would differ between one frame and all
    frames = HISTORY + 1
    R = randn(frames * batch, Z, size, size, device=device)
    W = 4 * randn(frames * batch, K, size, size, device=device)
    gradient = randn(*R.shape, device=device)
    backward = direction == "forward+backward"

    def run(parts: int) -> list[Tensor]:
        leaves = R.detach().requires_grad_(backward), W.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            pairs = zip(*(leaf.chunk(parts) for leaf in leaves), strict=True)
            out = torch.cat([context.aggregate(*pair) for pair in pairs])
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)] if backward else [out]

    attended = 2 * frames * batch * size**4 * (K if form == "paper" else Z // 2)
    return Case(
        "video",
        {"task": "attention", "form": form, "direction": direction, "batch": batch, "size": size},
        torch.float32,
        [
            Candidate("separate", functools.partial(run, frames)),
            Candidate("ours", functools.partial(run, 1)),
        ],
        bytes=2 * nbytes(R) + nbytes(W),
        flops=2 * attended * (3 if backward else 1),
    )


class Streamed(nn.Module):
    """A stream that always gets the same frame, so that it returns the same each time."""

    def __init__(self, model: models.Segmentor) -> None:
        super().__init__()
        self.model, self.stream = model, VideoStream(model)

    def forward(self, frame: Tensor) -> Tensor:
        return self.stream(frame).logits

    def warmed(self, frame: Tensor) -> Streamed:
        for _ in range(HISTORY + 1):
            self(frame)
        return self


def frame_case(
    form: str, device: str, *, size: int, backbone: str = BACKBONE, Z: int = 512
) -> Case:
    options = {"form": form, "noise": "fixed", "auxiliary_weight": 0.0, "feats_channels": Z}
    make = functools.partial(seeded, models.create)
    image = make("upernet_mcibipp", K, backbone, **options).to(device).eval()
    video = make("upernet_video_mcibipp", K, backbone, history=HISTORY, **options)
    video = video.to(device).eval()
    frame = randn(1, 3, size, size, device=device)
    clip = frame[:, None].expand(-1, HISTORY + 1, -1, -1, -1)
    with torch.no_grad():
        stream, folded = Streamed(video).warmed(frame), Streamed(video.fold()).warmed(frame)
    run: dict[str, Callable[[], Any]] = {
        "image": lambda: image(frame).logits,
        "clip": lambda: video(clip).logits,
        "folded": lambda: folded(frame),
        "ours": lambda: stream(frame),
    }
    given = {"image": (image, frame), "clip": (video, clip), "folded": (folded, frame)}
    given["ours"] = stream, frame
    counted = {name: count(module, images).true for name, (module, images) in given.items()}
    parts, *candidates = [
        Candidate(
            name,
            torch.no_grad()(call),
            counts=lambda name=name: {
                "multiply_adds": counted[name],
                "times_image": counted[name] / counted["image"],
            },
        )
        for name, call in run.items()
    ]
    return Case(
        "video",
        {"task": "frame", "form": form, "backbone": backbone, "batch": 1, "size": size},
        torch.float32,
        candidates,
        parts=[parts],
        bytes=nbytes(frame, *video.parameters()),
        flops=2 * counted["ours"],
    )


def stream_figures(
    device: str, *, frames: int = 1000, size: int = 256, backbone: str = "resnet18", Z: int = 128
) -> Row:
    """Figures of a long stream; for comparison the image model processes each frame as well."""
    streams = {}
    for name, model in (("image", "upernet_mcibipp"), ("video", "upernet_video_mcibipp")):
        made = seeded(models.create, model, K, backbone, feats_channels=Z)
        streams[name] = VideoStream(made.to(device).eval())
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    images = randn(8, 1, 3, size, size, device=device)
    seconds, held = dict.fromkeys(streams, 0.0), {}
    for number in range(1, frames + 1):
        for name, stream in streams.items():
            wait()
            start = time.perf_counter()
            stream(images[number % 8])
            wait()
            seconds[name] += time.perf_counter() - start
        if number in (frames // 10, frames):
            held[number] = resident(device)
    first, last = held.values()
    return {
        "backbone": backbone,
        "size": size,
        "frames": frames,
        "frames_per_second": frames / seconds["video"],
        "frames_per_second_image": frames / seconds["image"],
        "times_image": seconds["video"] / seconds["image"],
        "ring_bytes": streams["video"].nbytes,
        "grown_MiB_over_the_last_nine_tenths": (last - first) / 2**20,
    }


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    size = 16 if quick else 64
    for form in ("released", "paper"):
        for direction in ("forward", "forward+backward"):
            yield functools.partial(attention_case, size, form, direction, device)
    for form in ("released", "paper"):
        yield functools.partial(frame_case, form, device, size=128 if quick else 512)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``, and that of the long stream."""
    measured = run_cases("video", cases(device, quick), device, quick)
    if quick:
        row = stream_figures(device, frames=100, size=64, backbone="test_resnet")
    else:
        row = stream_figures(device, frames=1000 if device == "cpu" else 200)
    shown = {name: f"{x:.4g}" for name, x in row.items() if not isinstance(x, str)}
    print("\nstream:", ", ".join(f"{name} {value}" for name, value in shown.items()))
    return [measured, result_of("video_stream", device, ("backbone", "size", "frames"), [row])]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
