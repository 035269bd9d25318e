"""One of two ranks: counts its videos, reduces, writes the scores. Run by test_video_ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mcibi_fast.metrics import VideoMetrics
from mcibi_fast.training.processes import leave_group


def count(metrics: VideoMetrics, numbers: range) -> VideoMetrics:
    """Adds random videos of unequal length, each drawn from its number."""
    for video in numbers:
        generator = torch.Generator().manual_seed(video)
        metrics.start(video)
        for frame in range(4 + video):
            label = torch.randint(3, (6, 7), generator=generator) // 2
            prediction = torch.randint(3, (6, 7), generator=generator) // 2
            flow = torch.randn(2, 6, 7, generator=generator)
            metrics.update(prediction, label, flow=flow if frame else None)
    return metrics


def make(protocol: str) -> VideoMetrics:
    return VideoMetrics(3, protocol=protocol, windows=(2, 5), flow="given", max_videos=4)


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    scores = {
        protocol: count(make(protocol), range(rank, 5, 2)).reduce().compute().as_dict()
        for protocol in ("vspw2021", "strict")
    }
    out.write_text(json.dumps(scores))
    leave_group()
