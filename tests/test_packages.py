"""What `import mcibi_fast` gives without further imports, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mcibi_fast
from mcibi_fast import compat


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_are_imported_at_first_use() -> None:
    code = "import sys, mcibi_fast; print('torch' in sys.modules); print(mcibi_fast.{}.__name__)"
    for name in mcibi_fast._PACKAGES:
        assert run(code.format(name)).split() == ["False", f"mcibi_fast.{name}"]


@pytest.mark.parametrize("library", compat._LIBRARIES)
def test_libraries_are_imported_at_first_use(library: str) -> None:
    code = f"""
import sys
from mcibi_fast import compat
assert {library!r} in dir(compat) and "mcibi_fast.compat.{library}" not in sys.modules
print(compat.{library}.accelerate.__name__)
"""
    assert run(code) == "accelerate\n"


def test_other_names_are_errors() -> None:
    for module in (mcibi_fast, compat):
        with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018
