"""Evaluation metrics: a confusion matrix over a whole split, and the consistency of videos."""

from mcibi_fast.metrics.confusion import ConfusionMatrix, SegmentationMetrics
from mcibi_fast.metrics.flow import DISFlow, FlowFunction, RAFTFlow, default_flow, warp_backward
from mcibi_fast.metrics.temporal import (
    ConsistencyScore,
    TemporalConsistency,
    TemporalScore,
    VideoConsistency,
)
from mcibi_fast.metrics.video_scores import VideoMetrics, VideoScores

__all__ = [
    "ConfusionMatrix",
    "ConsistencyScore",
    "DISFlow",
    "FlowFunction",
    "RAFTFlow",
    "SegmentationMetrics",
    "TemporalConsistency",
    "TemporalScore",
    "VideoConsistency",
    "VideoMetrics",
    "VideoScores",
    "default_flow",
    "warp_backward",
]
