"""What is implausible in a dataset whose files can all be read."""

from __future__ import annotations

import numpy as np

from mcibi_fast.data.base import IGNORE_INDEX
from mcibi_fast.data.check_report import Report
from mcibi_fast.data.folder import one_class

_RARE = 1e-4  # share of the labelled pixels
_MANY = 16  # classes
_NAMED = 5


def find_doubts(report: Report, binary_hint: str, *, reduce_labels: bool = False) -> None:
    """Adds what is implausible about the labels to a finished report.

    Args:
        report: the report.
        binary_hint: what to do if masks of 0 and 255 are binary ones.
        reduce_labels: label 0 of the masks is ignored, see `FolderDataset`.
    """
    values = f"0 or {IGNORE_INDEX}" if reduce_labels else f"{IGNORE_INDEX}"
    for split, count in report.pairs.items():
        if count and not report.labelled[split]:
            report.problems.append(
                f"{split}: every pixel of its masks is {values} (ignored), so nothing can be "
                "learnt or scored; put class indices into the masks"
            )
    labelled = int(report.pixels.sum())
    if not labelled:
        return
    if report.ignored and report.pixels[0] == labelled:
        report.problems.append(one_class("the", reduce_labels, binary_hint))
    absent = [name for name, n in zip(report.classes, report.pixels, strict=True) if not n]
    if absent:
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        report.doubts.append(
            f"no pixel has the class {', '.join(absent[:_NAMED])}{more}; are the list of classes "
            "and the numbers in the masks those of each other?"
        )
    rare = int(np.count_nonzero(report.pixels < _RARE * labelled))
    if not report.listed and len(report.classes) >= _MANY and 2 * rare > len(report.classes):
        report.doubts.append(
            f"the masks were taken to have {len(report.classes)} classes, {rare} of which have "
            f"hardly a pixel: they look like grey levels or like masks that lossy compression has "
            "changed; put class indices into them, and list the classes in classes.txt"
        )
