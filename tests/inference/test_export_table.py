"""Every framework, by itself and with each memory, as ONNX and as .pt2.

By default some stand for the others (`MCIBI_FAST_TESTS=all` exports all): the context within the
image goes the same way in all frameworks with the same row here, and `test_export.py` compares the
memories.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mcibi_fast import models
from mcibi_fast.inference import export
from tests import thinning
from tests.inference.test_export import SPEC
from tests.models.peers_worker import build
from tests.models.stub_backbone import PEERS, stubbed

ALL = [
    (name, memory, suffix)
    for name in [*models.frameworks(), "setr pup", "setr naive"]
    for memory in (None, "mcibipp", "mcibi")
    if memory is None or models.registry.combines(name.split()[0])
    for suffix in ("onnx", "pt2")
]
# The operators of every peer's context are in its ONNX file without a memory, and every peer is
# traced with one as .pt2; these two have operators of their own beside the context's.
EVERY = {
    "ocrnet": "guided by a first prediction",
    "pointrend": "corrected after the last stage of inference",
}
CHOSEN = [
    (name, memory, suffix)
    for name, memory, suffix in ALL
    if (name in PEERS and (memory, suffix) in ((None, "onnx"), ("mcibipp", "pt2")))
    or (name in EVERY and (memory, suffix) in ((None, "pt2"), ("mcibipp", "onnx")))
    or (name == "ocrnet" and memory == "mcibi")
]
FAST = ("nonlocalnet", None, "pt2")
CASES = ALL if thinning.ALL else [*CHOSEN, FAST]


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stubbed(monkeypatch):
        yield


@pytest.mark.parametrize(
    ("name", "memory", "suffix"),
    [pytest.param(*case, marks=() if case == FAST else pytest.mark.slow) for case in CASES],
)
def test_exported(name: str, memory: str | None, suffix: str, tmp_path: Path) -> None:
    """`export.save` compares logits and class maps of the file with those of the model."""
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="needs mcibi-fast[onnx]")
    model, file = build(name, memory).float().eval(), tmp_path / f"model.{suffix}"
    stages = 2 if memory else None
    assert export.save(model, SPEC, file, size=(40, 48), stages=stages) and file.is_file()
