"""Writes op_schemas.h: the operators' schemas and numbers of mcibi_fast/_schemas.py for C++."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any


def table(root: Path) -> dict[str, Any]:
    """The names of mcibi_fast/_schemas.py, which needs no torch."""
    return runpy.run_path(str(root / "mcibi_fast" / "_schemas.py"))


def write(root: Path, build: Path) -> Path:
    """Write the header unless it is there; returns the folder in which sources can include it."""
    folder = build / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "op_schemas.h", _text(table(root))
    if not path.is_file() or path.read_text() != text:  # a new file would compile everything anew
        partial = path.with_suffix(f".{os.getpid()}")  # the tests may run in several processes
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
