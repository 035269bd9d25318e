"""COCO's run-length codes of masks.

pycocotools decodes them, too, but where the runs do not fill the image it returns memory that was
never written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LONGEST_RUN = 60  # bits


def decode_runs(counts: str | list[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """COCO's run lengths, as text or as numbers: down the columns, starting with zeros."""
    runs = parse_runs(counts) if isinstance(counts, str) else counts
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise ValueError("run lengths that do not fill the image")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(size[1], size[0]).T


def parse_runs(text: str) -> list[int]:
    """Five bits per character, lowest first, 32 for more; from the fourth on, the difference to the
    run two before."""
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        if not 0 <= code < 64 or shift > _LONGEST_RUN:
            raise ValueError("run lengths that are none")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
