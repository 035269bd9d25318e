"""FCN (Long et al., 2015): no context within the image."""

from __future__ import annotations

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework


@framework("fcn", "FCN")
class FCN(SegmentationHead):
    """Conv3x3-BN-ReLU on the last stage, then a classifier.

    With MCIBI++ or MCIBI (the first rows of Tables 1 and 3) the dataset-level context comes between
    R and the classifier.
    """
