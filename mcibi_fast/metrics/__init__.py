"""Evaluation metrics, computed from one integer confusion matrix over a whole split."""

from mcibi_fast.metrics.confusion import ConfusionMatrix, SegmentationMetrics

__all__ = ["ConfusionMatrix", "SegmentationMetrics"]
