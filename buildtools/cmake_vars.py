"""Prints what CMakeLists.txt needs to know, as CMake set() commands: paths, flags and sources.

CMake runs it with the project's Python, so that both builds share one description. Its argument is
the build folder, into which it writes the generated header.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from buildtools import op_header, plan, toolchain  # noqa: E402


def cmake_vars(build: Path) -> dict[str, list[str]]:
    torch = toolchain.find_torch()
    csrc = ROOT / "csrc"
    flavours = toolchain.cpu_flavours()
    values = {
        "MCIBI_INCLUDES": [str(op_header.write(ROOT, build)), str(torch.include)],
        "MCIBI_TORCH_LIB": [str(torch.lib)],
        "MCIBI_CXX_FLAGS": [*plan.CXX_FLAGS, *plan.common_defines()],
        "MCIBI_LIBRARY_SOURCES": [str(p) for p in plan.library_sources(csrc)],
        "MCIBI_KERNEL_SOURCES": [str(p) for p in plan.kernel_sources(csrc)],
        "MCIBI_FLAVOURS": list(flavours),
    }
    for flavour, flags in flavours.items():
        values[f"MCIBI_FLAGS_{flavour}"] = [*flags, *plan.flavour_defines(flavour)]
    return values


if __name__ == "__main__":
    for name, items in cmake_vars(Path(sys.argv[1])).items():
        print(f"set({name} {' '.join(f'[==[{item}]==]' for item in items)})")
