"""The workflows in .github/ are valid, and their steps are the project's own scripts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("needs the source tree (.github/)", allow_module_level=True)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_steps_are_our_own_scripts(file: Path) -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = []
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            found += step.get("run", "").splitlines()
    assert found
    for line in found:
        program, *words = line.split()
        if program == "make":
            assert words and set(words) <= targets, line
        elif program == "python":
            assert (ROOT / words[0]).is_file(), line
        elif program == "pip":
            assert words[-1] == "wheelhouse/cpu/*.whl", line  # where `make wheels` puts it
        else:
            assert (ROOT / program).is_file(), line
