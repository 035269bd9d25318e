"""Where a result comes from: commit, versions, device, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import mcibi_fast

_ROOT = Path(mcibi_fast.__file__).resolve().parents[1]


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit, as plain data.

    Args:
        device: "cuda..." or "cpu", where the result was computed.
    """
    info = mcibi_fast.build_info()
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # near 0 if nothing else ran on the machine
        "cpu_flavour": info["cpu_flavour"],
        "mcibi_fast": info["version"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "commit": commit(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """The checkout's commit, with a mark if files differ from it; "unknown" outside a checkout."""
    if not (_ROOT / ".git").exists():  # an installed package may lie in someone else's checkout
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
