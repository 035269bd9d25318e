"""One training per directory, and one run of all processes that a launcher started."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mcibi_fast
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training import processes
from mcibi_fast.training.owner import owned
from mcibi_fast.training.processes import start_accelerator
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import train

PACKAGE = str(Path(mcibi_fast.__file__).parents[1])

# Holds the directory, as does a process forked from it, until it is killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from mcibi_fast.training.owner import owned
with owned(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_two_trainings_in_one_directory(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with owned(out):
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"out: {out} is in use by .* {owner}; wait"):
                train(tiny_config(), out, resume=resume, progress=False)
    assert not out.exists()
    with owned(out):
        (out / "config.json").touch()
    assert [file.name for file in out.iterdir()] == ["config.json"]


def test_a_killed_owner_leaves_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": PACKAGE},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid} on"), owned(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with owned(tmp_path):
            os.kill(child, 0)  # a loader that lives on holds nothing
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_without_locks_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    lines: list[str] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with owned(tmp_path / "run", lines.append):
        pass
    (line,) = lines
    assert line.startswith(f"warning: {tmp_path / 'run'} cannot be locked (No locks available)")


def test_a_demo_does_not_remove_one_that_runs(tmp_path: Path, fails: Callable[..., str]) -> None:
    running = tmp_path / "fcn-seed0"
    with owned(running):
        (running / "config.json").touch()
        assert "is in use by the training of" in fails("demo", "--out", tmp_path)
        assert (running / "config.json").exists()


def test_fp16_on_a_cpu_is_refused(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixed_precision: fp16 needs a GPU; .*=bf16 or no"):
        train(tiny_config("mixed_precision=fp16"), tmp_path, progress=False)


def test_processes_that_are_not_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = SimpleNamespace(num_processes=1, device=torch.device("mps"))
    monkeypatch.setattr(processes, "Accelerator", lambda **options: alone)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match=r"launcher started 3 processes \(WORLD_SIZE\), but on mps"
    ):
        start_accelerator()


DRIVER = """
import json, sys
from accelerate.utils import gather_object
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training.train import train
from mcibi_fast.training.trainer import Trainer

close = Trainer.close

def told(self):
    model = self.model
    weights = {name: value.double().sum().item() for name, value in model.named_parameters()}
    weights["memory"] = model.memory.memory.tolist()
    seen = gather_object([weights])
    if self.is_main:
        json.dump(seen, open(sys.argv[2], "w"))
    close(self)

Trainer.close = told
train(TrainConfig.from_dict(json.loads(sys.argv[1])), sys.argv[3], progress=False)
"""


@pytest.mark.slow
def test_torchrun_without_a_gpu_is_one_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    out, seen = tmp_path / "run", tmp_path / "seen.json"
    (tmp_path / "driver.py").write_text(DRIVER)
    config = tiny_config("device=auto", "epochs=1", "log_every=1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, tmp_path / "driver.py", json.dumps(config.to_dict()), seen, out],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1/1") == 1
    assert [entry["step"] for entry in Run(out).history() if "loss" in entry] == [1, 2, 3]
    assert len(Run(out).load_state()[1]["random"]) == 2
    first, second = json.loads(seen.read_text())
    assert first == second and len(first) > 10
