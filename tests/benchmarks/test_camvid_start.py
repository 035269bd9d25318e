"""The first epochs with parts of the head taken out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import camvid_start
from mcibi_fast.nn.context import DatasetLevelContext
from mcibi_fast.nn.memory import GaussianMemory
from tests.benchmarks.small_camvid import SETTINGS, write_small_camvid


def gradients(name: str) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """C_bi, C~_bi, and whether R, the key's projection and the logits of W get a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        context = DatasetLevelContext(GaussianMemory(3, 8), transform_channels=4)
    R = torch.linspace(-1, 1, 96).reshape(1, 8, 3, 4).requires_grad_()
    logits = R.detach()[:, :3].clone().requires_grad_()
    key = context.attention.key[0][0].weight
    with camvid_start.VARIANTS[name][1]():
        C = context.aggregate(R, logits)
    found = [False] * 3
    if C.requires_grad:
        grads = torch.autograd.grad(C.square().sum(), (R, key, logits), allow_unused=True)
        found = [g is not None and bool(g.any()) for g in grads]
    return C.detach(), context.memory.aggregate(logits.detach()), found


def test_variants_take_out_what_they_say() -> None:
    usual, gathered, found = gradients("MCIBI++")
    assert found == [True, True, True] and not torch.equal(usual, gathered)
    C, _, found = gradients("C_bi = 0")
    assert not C.any() and found == [False] * 3
    C, gathered, found = gradients("C_bi = C~_bi")
    assert torch.equal(C, gathered) and found == [False, False, True]
    C, _, found = gradients("C_bi detached")
    assert torch.equal(C, usual) and found == [False] * 3
    C, _, found = gradients("R detached for the query")
    assert torch.equal(C, usual) and found == [False, True, True]
    assert torch.equal(gradients("MCIBI++")[0], usual)  # nothing of the changes stays


@pytest.mark.slow
def test_losses_of_the_first_epochs(tmp_path: Path, monkeypatch, capsys) -> None:
    root = write_small_camvid(tmp_path / "data")
    settings = [*SETTINGS, "model.options.feats_channels=8", "epochs=4", "log_every=1"]
    command = ["camvid_start", str(tmp_path / "runs"), "--root", root, "--epochs", "2"]
    only = ["--only", "FCN", "W detached"]
    printed: list[list[list[str]]] = []
    for _ in range(2):  # the second time, finished runs are left as they are
        monkeypatch.setattr(sys, "argv", [*command, *only, "--set", *settings])
        camvid_start.main()
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if ": loss" in line]
        names = [row[-3] for row in rows]
        assert names == ["loss_cls", "loss_aux", "loss_cls", "loss_pr", "loss_aux"]
        assert all(0 < float(value) < 5 for row in rows for value in row[-2:])
        printed.append(rows)
    assert printed[0] == printed[1]
