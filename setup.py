"""Builds the compiled parts with buildtools/; everything else is described in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not put the project on the path

from buildtools.build import RECORD, build  # noqa: E402


class BuildKernels(build_ext):
    """Builds what this machine can build; what it cannot is recorded and printed, not an error."""

    def run(self) -> None:
        build(ROOT, self._package_dir(), ROOT / "build" / "temp")  # kept: the next one is quick

    def _package_dir(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "mcibi_fast"

    def get_outputs(self) -> list[str]:
        folder = self._package_dir()
        names = ("_cpu.so", "_cuda.so", RECORD)
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install builds straight into the source folder


class Wheel(bdist_wheel):
    """One wheel per platform: the compiled parts depend neither on Python nor on torch's age."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("mcibi_fast._cpu", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
