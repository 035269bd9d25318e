"""The wheel that `make wheels` builds: what is in it, and that it runs where no compiler is.

It is tried with this Python and torch. MCIBI_FAST_WHEEL_PYTHONS names interpreters of further
environments, which need pip, torch and numpy, such as the oldest that the package supports:
``MCIBI_FAST_WHEEL_PYTHONS="a/bin/python b/bin/python" pytest tests/test_wheel.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mcibi_fast

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "buildtools").is_dir():
    pytest.skip("needs the source tree (buildtools/)", allow_module_level=True)

from buildtools import wheels  # noqa: E402

PYTHONS = [sys.executable, *os.environ.get("MCIBI_FAST_WHEEL_PYTHONS", "").split()]


@pytest.mark.slow
def test_one_wheel_for_every_python_and_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built from the checkout's CPU part, which is not compiled again."""
    pytest.importorskip("auditwheel")
    if (why_not := mcibi_fast.build_info()["backends"]["cpu"]) is not True:
        pytest.skip(f"needs _cpu: {why_not}")
    monkeypatch.setenv("MCIBI_FAST_CPU", "0")
    wheel = wheels.build_wheel(ROOT, tmp_path / "wheelhouse", "cpu")
    check_contents(wheel)
    for i, python in enumerate(PYTHONS):
        try_out(wheel, python, tmp_path / f"site{i}")


def check_contents(wheel: Path) -> None:
    """Its name says that every Python can use it, and it has all files and no others."""
    version = mcibi_fast.__version__
    assert re.fullmatch(
        rf"mcibi_fast-{re.escape(version)}-py3-none-manylinux_[\w.]+\.whl", wheel.name
    )
    files = zipfile.ZipFile(wheel).namelist()
    assert [name for name in files if ".so" in name] == ["mcibi_fast/_cpu.so"]
    for name in ("py.typed", "_build_record.json", "serving/page.html", "reports/templates/"):
        assert any(file.startswith(f"mcibi_fast/{name}") for file in files), name
    metadata = f"mcibi_fast-{version}.dist-info/"
    assert all(file.startswith(("mcibi_fast/", metadata)) for file in files)


def try_out(wheel: Path, python: str, site: Path) -> None:
    """A small row of every op runs, the package coming from the wheel alone."""
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(site), str(wheel)], check=True)
    done = subprocess.run(
        [python, str(ROOT / "tests" / "wheel_smoke.py")],
        cwd=site,
        env={"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.match(r"(\d+) rows on Python", done.stdout)
    assert found and int(found[1]) >= 10, done.stdout
    print(done.stdout, end="")


def test_no_wheel_without_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that could not be built ends the command with the reason."""

    def pip(command: list[str], **options: object) -> None:
        folder = Path(command[command.index("--wheel-dir") + 1])
        record = {"cpu": {"built": True}, "cuda": {"built": False, "reason": "nvcc was not found"}}
        with zipfile.ZipFile(folder / "a.whl", "w") as built:
            built.writestr("mcibi_fast/_build_record.json", json.dumps(record))

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(SystemExit, match="no wheel without the cuda part: nvcc was not found"):
        wheels.build_wheel(tmp_path, tmp_path / "out", "cuda")
    assert not (tmp_path / "out").exists()
