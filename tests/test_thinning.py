"""The cases that stand for a product of parameters: `tests/thinning.py`."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from tests import thinning

NAMES, MEMORIES, KINDS = ("fcn", "pspnet", "isnet", "upernet"), (None, "mcibi"), ("onnx", "pt2")


def cases(**options: Any) -> list[Any]:
    """The 16 cases of a test with three parameters, and a test without any."""
    mark = pytest.mark.thinned(**options).mark
    found = [
        SimpleNamespace(
            name=f"test_x[{'-'.join(map(str, values))}]",
            nodeid=f"test_a.py::test_x[{'-'.join(map(str, values))}]",
            callspec=SimpleNamespace(
                params=dict(zip(("name", "memory", "kind"), values, strict=True))
            ),
            get_closest_marker=lambda _: mark,
        )
        for values in product(NAMES, MEMORIES, KINDS)
    ]
    other = SimpleNamespace(nodeid="test_a.py::test_y", get_closest_marker=lambda _: None)
    return [SimpleHashable(item) for item in (*found, other)]


class SimpleHashable(SimpleNamespace):
    def __init__(self, item: SimpleNamespace) -> None:
        super().__init__(**vars(item))

    __hash__ = object.__hash__


def kept(**options: Any) -> list[tuple[Any, ...]]:
    items = every = cases(**options)
    items = list(items)
    left_out = thinning.thin(items)
    assert [item for item in every if item in items or item in left_out] == every
    assert len(items) + len(left_out) == 17 and items[-1].nodeid.endswith("test_y")
    return [tuple(item.callspec.params.values()) for item in items[:-1]]


@pytest.fixture(autouse=True)
def by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "ALL", False)


def test_every_value_stays_once() -> None:
    found = kept()
    assert 4 <= len(found) < 8 and found == kept()
    assert [{*values} for values in zip(*found, strict=True)] == [{*NAMES}, {*MEMORIES}, {*KINDS}]


def test_every_pair_stays_once() -> None:
    found = kept(together=2)
    assert 8 <= len(found) < 16
    assert {case[:2] for case in found} == {*product(NAMES, MEMORIES)}
    assert {case[1:] for case in found} == {*product(MEMORIES, KINDS)}
    assert {case[::2] for case in found} == {*product(NAMES, KINDS)}


def test_some_values_stay_in_every_combination() -> None:
    found = kept(always={"name": ["isnet"]})
    assert {case for case in found if case[0] == "isnet"} == {*product(["isnet"], MEMORIES, KINDS)}
    assert {name for name, *_ in found} == {*NAMES} and len(found) == 7


def test_others_are_left_out_altogether() -> None:
    assert kept(only={"name": ["fcn", "isnet"], "kind": ["onnx"], "memory": ["mcibi"]}) == [
        ("fcn", "mcibi", "onnx"),
        ("isnet", "mcibi", "onnx"),
    ]


def test_a_case_alone_was_asked_for() -> None:
    items = cases(only={"name": ["fcn"]})[-2:]
    assert items[0].callspec.params["name"] == "upernet"
    assert thinning.thin(items) == [] and len(items) == 2


def test_all_of_them_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "ALL", True)
    assert len(kept()) == 16
