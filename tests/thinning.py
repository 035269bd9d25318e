"""Which cases of a product of parameters run by default; `MCIBI_FAST_TESTS=all` runs every one.

Of a test marked `@pytest.mark.thinned` so many cases stay as give each value of each parameter at
least once. With `together=2` each pair of values of two parameters stays, as the paths of a kernel
are chosen by a size together with a dtype or a layout. With `always={"name": ["fcn"]}` all cases
with this value stay as well, so that one framework, say, is in every combination; with
`only={"arch": ["sm_90"]}` none with another value does. The choice depends on the parameters alone.
The other cases are left out as the tests are collected, but one that is asked for by name runs.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator
from itertools import combinations
from typing import Any

import pytest

ALL = os.environ.get("MCIBI_FAST_TESTS") == "all"


def thin(items: list[pytest.Item]) -> list[pytest.Item]:
    """Takes the cases that others stand for out of ``items`` and returns them."""
    if ALL:
        return []
    products: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thinned"):
            products[item.nodeid.partition("[")[0]].append(item)
    kept = {
        case
        for cases in products.values()
        for case in (_representatives(cases) if len(cases) > 1 else cases)
    }
    left_out = [case for cases in products.values() for case in cases if case not in kept]
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]
    return left_out


def _representatives(cases: list[pytest.Item]) -> Iterator[pytest.Item]:
    """First what always stays; then, in an order that mixes all values, what has a new one."""
    seen: set[Hashable] = set()
    wanted = [case for case in cases if all(_named(case, "only"))]
    mixed = sorted(wanted, key=lambda case: zlib.crc32(case.name.encode()))
    for case in sorted(mixed, key=lambda case: not _always(case)):
        values = _values(case)
        if _always(case) or not values <= seen:
            seen |= values
            yield case


def _options(case: pytest.Item) -> dict[str, Any]:
    mark = case.get_closest_marker("thinned")
    assert mark is not None
    return mark.kwargs


def _parameters(case: pytest.Item) -> dict[str, Any]:
    return case.callspec.params  # type: ignore[attr-defined]


def _always(case: pytest.Item) -> bool:
    return any(_named(case, "always"))


def _named(case: pytest.Item, option: str) -> list[bool]:
    """Whether the case has one of the values that an option names, for each of its parameters."""
    named = _options(case).get(option, {})
    return [_parameters(case)[name] in values for name, values in named.items()]


def _values(case: pytest.Item) -> set[Hashable]:
    """Its values, or groups of so many values as ``together`` says, with their parameters."""
    pairs = [(name, _hashable(value)) for name, value in sorted(_parameters(case).items())]
    return set(combinations(pairs, min(_options(case).get("together", 1), len(pairs))))


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)  # the same object in all its cases
    return value
