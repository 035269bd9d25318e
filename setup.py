"""Builds the compiled parts with buildtools/; everything else is described in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not put the project on the path

from buildtools.build import RECORD, build  # noqa: E402


class BuildKernels(build_ext):
    """Builds what this machine can build; what it cannot is recorded and printed, not an error."""

    def run(self) -> None:
        build(ROOT, self._package_dir(), ROOT / self.build_temp)

    def _package_dir(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "mcibi_fast"

    def get_outputs(self) -> list[str]:
        folder = self._package_dir()
        names = [*folder.glob("_C*.so"), *folder.glob("_cuda*.so"), folder / RECORD]
        return [str(path) for path in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install builds straight into the source folder


setup(
    ext_modules=[Extension("mcibi_fast._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
