"""The names of the two ways to score videos.

`mcibi_fast.metrics.temporal` explains them. The names are kept here, apart from torch, so that the
command line can list them quickly.
"""

from __future__ import annotations

PROTOCOLS: tuple[str, ...] = ("vspw2021", "strict")


def check_protocol(protocol: str) -> None:
    """Raises ValueError unless the name is one of `PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
