"""The names of the two ways to score videos, for the command line as well: no torch here.

`mcibi_fast.metrics.temporal` says what they are.
"""

from __future__ import annotations

PROTOCOLS: tuple[str, ...] = ("vspw2021", "strict")


def check_protocol(protocol: str) -> None:
    """Raises ValueError unless it is one of `PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
