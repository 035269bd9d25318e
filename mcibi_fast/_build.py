"""Loads the compiled parts; reports what was built, what can be used, and why the rest cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from mcibi_fast._schemas import DIGEST
from mcibi_fast.version import __version__

_FOLDER = Path(__file__).parent


@functools.cache
def load_extensions() -> dict[str, str | None]:
    """Loads the compiled parts, once per process, without using any device.

    Returns:
        For each backend None if its kernels can be called, otherwise the reason why not.
    """
    record = _record()
    triton = importlib.util.find_spec("triton")
    return {
        "reference": None,
        "cpu": _load_cpu(record),
        "cuda": _load_cuda(record),
        "triton": None if triton else "Triton is not installed (torch for CUDA on Linux brings it)",
        "sdpa": None,
    }


def build_info() -> dict[str, Any]:
    """How this installation was built, and which backends can be used.

    Returns:
        ``version``; ``torch_built``, the torch whose headers the compiled parts used, and
        ``torch_running``; ``compiler``; ``cpu_flavours``, the instruction sets built for, and the
        ``cpu_flavour`` in use (None without compiled parts); ``cuda_toolkit`` and ``cuda_archs`` of
        the CUDA part (None and [] without it); ``devices``, the names of the GPUs; ``backends``:
        for each one True, or the reason why it cannot be used.
    """
    record = _record()
    reasons = dict(load_extensions())
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices:
        for name in ("cuda", "triton"):
            reasons[name] = reasons[name] or "no CUDA device is visible"
    cpu, cuda = record.get("cpu", {}), record.get("cuda", {})
    flavour = None
    if reasons["cpu"] is None:
        flavour = importlib.import_module("mcibi_fast._C").build_info()["cpu_flavour"]
    return {
        "version": __version__,
        "torch_built": record.get("torch"),
        "torch_running": torch.__version__,
        "compiler": cpu.get("compiler"),
        "cpu_flavours": cpu.get("flavours", []),
        "cpu_flavour": flavour,
        "cuda_toolkit": cuda.get("toolkit"),
        "cuda_archs": cuda.get("archs", []),
        "devices": devices,
        "backends": {name: reason or True for name, reason in reasons.items()},
    }


def _record() -> dict[str, Any]:
    """The record that the build wrote; empty if nothing was built in this source tree yet."""
    path = _FOLDER / "_build_record.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _not_built(record: dict[str, Any], part: str) -> str | None:
    if not record:
        return "not built: run pip install, or python setup.py build_ext --inplace"
    if record["version"] != __version__:
        return f"built for version {record['version']}, this is {__version__}: build again"
    return None if record[part]["built"] else f"not built: {record[part]['reason']}"


def _load_cpu(record: dict[str, Any]) -> str | None:
    if reason := _not_built(record, "cpu"):
        return reason
    try:
        importlib.import_module("mcibi_fast._C")
    except ImportError as error:
        return f"mcibi_fast._C does not load: {error}"
    return _older_sources(record)


def _load_cuda(record: dict[str, Any]) -> str | None:
    if reason := _not_built(record, "cuda"):
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.ops.load_library(_FOLDER / "_cuda.so")
    except OSError as error:
        return f"_cuda.so does not load: {error.__cause__ or error}"
    return _older_sources(record)


def _older_sources(record: dict[str, Any]) -> str | None:
    """Why the operators of a library that was loaded cannot be called; None if they can."""
    if record.get("schemas") == DIGEST:
        return None
    return "built from older sources, with other operators: build again"
