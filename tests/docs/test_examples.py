"""The programs and the notebook of examples/ run, in small, on the built-in data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("needs the source tree (examples/)", allow_module_level=True)
pytestmark = pytest.mark.slow


def run(folder: Path, *words: str) -> str:
    """What an example prints, run in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drop_in_loss(tmp_path: Path) -> None:
    """Both losses are the same, in every step."""
    pytest.importorskip("transformers")
    lines = run(tmp_path, "drop_in_loss.py", "--size", "64", "--steps", "2").splitlines()
    theirs, ours = ([float(v) for v in line.rpartition(":")[2].split()] for line in lines[:2])
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-5)
    assert float(lines[-1].rpartition(" ")[2]) < 1e-4


def test_finetune_and_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one example is what the other one serves."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("fastapi")
    assert "mcibi-fast predict" in run(tmp_path, "finetune_camvid.py", "--quick", "--out", "run")
    monkeypatch.syspath_prepend(EXAMPLES)
    import export_and_serve

    app = export_and_serve.build(str(tmp_path / "run"), tmp_path / "model.onnx")
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert {"/", "/predict", "/about"} <= paths and (tmp_path / "model.onnx").is_file()


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, in order."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "first_model.ipynb", as_version=4)
    kernel = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=kernel).execute()
    texts = [str(cell.get("outputs")) for cell in notebook.cells if cell.cell_type == "code"]
    assert "3 stage(s)" in texts[-1] and sum("image/png" in text for text in texts) == 3
