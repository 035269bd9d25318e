"""The names of the two ways to test a model, and of the two ways to score videos.

`mcibi_fast.inference.labels` and `mcibi_fast.metrics.temporal` explain them. The names are kept
here, apart from torch, so that the command line can list them quickly.
"""

from __future__ import annotations

import typing
from typing import Literal

TestProtocol = Literal["own", "released"]
TEST_PROTOCOLS: tuple[str, ...] = typing.get_args(TestProtocol)

PROTOCOLS: tuple[str, ...] = ("vspw2021", "strict")


def check_protocol(protocol: str) -> None:
    """Raises ValueError unless the name is one of `PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")


def check_test_protocol(protocol: str) -> None:
    """Raises ValueError unless the name is one of `TEST_PROTOCOLS`."""
    if protocol not in TEST_PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(TEST_PROTOCOLS)}")
