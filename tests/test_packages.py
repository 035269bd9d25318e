"""What `import mcibi_fast` gives without further imports, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mcibi_fast
from mcibi_fast import compat

CODE = """
import sys
import mcibi_fast
from mcibi_fast import compat
assert not {"torch", "transformers"} & sys.modules.keys()
for name in mcibi_fast._PACKAGES:
    assert getattr(mcibi_fast, name).__name__ == f"mcibi_fast.{name}"
for name in compat._LIBRARIES:
    assert f"mcibi_fast.compat.{name}" not in sys.modules and name in dir(compat)
    assert callable(getattr(compat, name).accelerate)
"""


def test_packages_and_libraries_are_imported_at_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_names_are_errors() -> None:
    for module in (mcibi_fast, compat):
        with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018
