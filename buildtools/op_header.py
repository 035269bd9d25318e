"""Writes op_schemas.h, which gives C++ the operators' schemas and numbers of _schemas.py."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any


def table(root: Path) -> dict[str, Any]:
    """The variables of mcibi_fast/_schemas.py, which can run without torch."""
    return runpy.run_path(str(root / "mcibi_fast" / "_schemas.py"))


def write(root: Path, build: Path) -> Path:
    """Writes the header unless it is up to date; returns the folder to include it from."""
    folder = build / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "op_schemas.h", _text(table(root))
    if not path.is_file() or path.read_text() != text:  # a new file would recompile everything
        partial = path.with_suffix(f".{os.getpid()}")  # several processes may write it in tests
        partial.write_text(text)
        partial.replace(path)
    return folder


def _text(schemas: dict[str, Any]) -> str:
    lines = ["// Written by buildtools/op_header.py.", "#pragma once", "", "#include <cstdint>", ""]
    for backend in ("cpu", "cuda"):
        lines.append(f"namespace mcibi_fast::{backend}_schemas {{")
        for name in schemas["SCHEMAS"]:
            definition = schemas["compiled_schema"](backend, name)
            lines.append(f'inline constexpr char {name}[] = "{definition}";')
        lines.append("}")
    lines.append("namespace mcibi_fast::label_ops {")
    for number, name in enumerate(schemas["OPS_WITH_LABELS"]["cuda"]):
        lines.append(f"inline constexpr int64_t {name} = {number};")
    return "\n".join([*lines, "}", ""])
