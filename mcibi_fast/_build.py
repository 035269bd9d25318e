"""Loads the compiled parts; reports what was built, what can be used, and why the rest cannot."""

from __future__ import annotations

import functools
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
        "pytorch": None,
    }


@functools.cache
def why_not_on(device: int) -> str | None:
    """Why a GPU cannot run the CUDA part, which is for some architectures; None if it can."""
    return no_code_for(_record()["cuda"]["archs"], torch.cuda.get_device_capability(device))


def no_code_for(archs: list[str], capability: tuple[int, int]) -> str | None:
    """Why code for these architectures ("9.0", "9.0a", "12.0+PTX") does not run on a GPU.

    Machine code runs on GPUs of its major version that are not older, "9.0a" on 9.0 alone; PTX runs
    on every GPU that is not older.

    Returns:
        None if it runs, otherwise the reason with what to do.
    """
    for arch in archs:
        name, _, ptx = arch.partition("+")
        number = name.rstrip("af")
        built = tuple(map(int, number.split(".")))
        if capability == built:
            return None
        if capability > built and (
            (capability[0] == built[0] and not name.endswith("a")) or (ptx and name == number)
        ):
            return None
    gpu = "{}.{}".format(*capability)
    return (
        f"built for {', '.join(archs)}, and this GPU is {gpu}: "
        f"build again with MCIBI_FAST_CUDA_ARCHS={gpu}"
    )


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
    elif reasons["cuda"] is None:
        why_not = [why_not_on(i) for i in range(len(devices))]
        reasons["cuda"] = None if None in why_not else why_not[0]
    cpu, cuda = record.get("cpu", {}), record.get("cuda", {})
    flavour = None
    if reasons["cpu"] is None:
        flavour = torch.ops.mcibi_fast_cpu.cpu_flavour()
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
    return _not_built(record, "cpu") or _load(record, "_cpu.so")


def _load_cuda(record: dict[str, Any]) -> str | None:
    if reason := _not_built(record, "cuda"):
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return _load(record, "_cuda.so")


def _load(record: dict[str, Any], library: str) -> str | None:
    """Loads a library; returns why its operators cannot be called, None if they can."""
    try:
        torch.ops.load_library(_FOLDER / library)
    except OSError as error:
        return f"{library} does not load: {error.__cause__ or error}"
    if record.get("schemas") == DIGEST:
        return None
    return "built from older sources, with other operators: build again"
