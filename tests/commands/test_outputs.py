"""Commands check their outputs before they begin, and never write over their inputs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.commands.outputs import check_file, check_folder
from tests.test_cli import TINY, write_dataset

Fails = Callable[..., str]
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory; tests only read it."""
    from mcibi_fast.recipes.registry import configure
    from mcibi_fast.training.train import train

    base = tmp_path_factory.mktemp("outputs")
    config = configure("folder", str(write_dataset(base / "data", count=2)), list(TINY))
    with torch.random.fork_rng(devices=[]):
        train(config, base / "run", progress=False)
    return base / "run"


OUTPUTS = {  # with {} for a path where nothing can be written
    "evaluate": ("evaluate {run} --cpu --json {}", "--json"),
    "predict": ("predict {run} {data}/images/val --cpu --out {}", "--out"),
    "video": ("video {run} {data}/images/val --cpu --out {}", "--out"),
    "report": ("report {run} --cpu --out {}", "--out"),
    "gallery": ("report {run} --cpu --gallery {}", "--gallery"),
    "train": ("train folder --root {data} --out {}", "--out"),
    "demo": ("demo --out {}", "--out"),
    "ablate": ("ablate 2 --out {}", "--out"),
    "data check": ("data check {data} --out {}", "--out"),
    "data pack": ("data pack {data} {}", "data pack"),
    "export": ("export {run} {}.pt2", "export"),
    "convert": ("convert {run}/config.json {}.safetensors", "convert"),
    "bench": ("bench memory_update --out {}", "--out"),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_are_checked_first(
    command: str, run: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcibi_fast.models import checkpoint
    from mcibi_fast.training import train

    for module in ("ablations.ablation", "reports.runs", "reports.demo"):
        importlib.import_module(f"mcibi_fast.{module}")  # before anything is replaced

    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("the work began")

    for module, name in ((checkpoint, "load_model"), (train, "train"), (subprocess, "run")):
        monkeypatch.setattr(module, name, work)
    (tmp_path / "file").write_text("mine")
    below_file = tmp_path / "file" / "out"
    text, option = OUTPUTS[command]
    words = [word.format(below_file, run=run, data=run.parent / "data") for word in text.split()]
    line = fails(*words)
    assert f"error: {option}" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_file("--json", tmp_path / "a.json") == tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"--json .*b/a: there is no folder .*b; make it"):
        check_file("--json", tmp_path / "b" / "a")
    assert check_file("--out", tmp_path / "b" / "c" / "a", make_folder=True)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match=r"--json .*: is a folder; name a file"):
        check_file("--json", tmp_path)
    with pytest.raises(OSError, match="File name too long"):
        check_file("--json", tmp_path / ("x" * 300))
    (tmp_path / "in.pth").write_bytes(b"1")
    (tmp_path / "link").symlink_to("in.pth")
    for name in ("in.pth", "link"):
        with pytest.raises(ValueError, match="is one of the inputs; name another file"):
            check_file("convert", tmp_path / name, inputs=[tmp_path / "in.pth"])
    assert check_folder("--out", tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match=r"in.pth is not a folder; choose another"):
        check_folder("--out", tmp_path / "in.pth" / "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check in (check_file, check_folder):
        with pytest.raises(PermissionError, match=r"--out .*: nothing may be written in"):
            check("--out", tmp_path / "new")


@pytest.mark.parametrize(
    "name", ["config.json", "data.json", "history.jsonl", "checkpoints/last/state.pt"]
)
def test_a_runs_own_files_are_no_outputs(
    name: str, run: Path, tmp_path: Path, fails: Fails
) -> None:
    before = (run / name).read_bytes()
    for checkpoint in (run, run / "checkpoints" / "last" / "model.safetensors"):
        assert "is a run's own file" in fails("evaluate", checkpoint, "--json", run / name)
    assert "is a run's own file" in fails("report", run, "--out", run / name)
    (tmp_path / "link").symlink_to(run)
    assert "is a run's own file" in fails("evaluate", run, "--json", tmp_path / "link" / name)
    assert (run / name).read_bytes() == before


def test_all_splits_are_checked_before_the_first_is_packed(
    run: Path, tmp_path: Path, fails: Fails
) -> None:
    pytest.importorskip("webdataset", reason="needs webdataset to write shards")
    (tmp_path / "shards" / "val").mkdir(parents=True)
    line = fails("data", "pack", run.parent / "data", tmp_path / "shards", "--workers", "0")
    assert "val: already there; remove it, or choose another folder" in line
    assert not (tmp_path / "shards" / "train").exists()


def test_shards_are_checked_as_they_were_packed(run: Path, tmp_path: Path, fails: Fails) -> None:
    pytest.importorskip("webdataset", reason="needs webdataset to write shards")
    shards = tmp_path / "shards"
    options = ["--workers", "0", "--quiet"]
    assert cli.main(["data", "pack", str(run.parent / "data"), str(shards), *options]) == 0
    for option in (["--binary"], ["--reduce-labels"], ["--classes", "a,b"]):
        line = fails("data", "check", shards, *option)
        assert f"{option[0]}: {shards} holds shards, packed with their classes" in line


def test_predict_twice_into_the_source_folder(
    run: Path, tmp_path: Path, fails: Fails, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.parent / "data" / "images" / "val", tmp_path / "in")
    command = ["predict", str(run), str(tmp_path / "in"), "--cpu", "--quiet", "--out"]
    for note in ("", "4 pictures left out: predict wrote them\n"):
        assert cli.main([*command, str(tmp_path / "in" / "out")]) == 0
        assert (
            capfd.readouterr().out == f"2 label maps in {tmp_path}/in/out, full precision\n{note}"
        )
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.png").write_bytes(b"mine")
    line = fails(*command, tmp_path)
    assert "labels/0.png is already there" in line and "--overwrite" in line
    assert cli.main([*command, str(tmp_path), "--overwrite"]) == 0


@pytest.mark.slow
def test_large_images_are_announced(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((1100, 1000, 3), np.uint8)).save(tmp_path / "a.png")
    command = ["predict", str(run), str(tmp_path / "a.png"), "--cpu", "--quiet", "--no-overlays"]
    note = "1 of them in windows of 512x512, as the images are large (--window none takes them"
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 0
    assert note in capfd.readouterr().out
    assert cli.main([*command, "--out", str(tmp_path / "b"), "--window", "none"]) == 0
    assert "windows" not in capfd.readouterr().out
    byhand = [*command, "--out", str(tmp_path / "c"), "--window", "512,512"]
    assert cli.main(byhand) == 0
    assert "windows" not in capfd.readouterr().out
    maps = [np.array(Image.open(tmp_path / name / "labels" / "a.png")) for name in "ac"]
    assert np.array_equal(*maps)


def test_a_report_of_data_with_other_classes(run: Path, tmp_path: Path, fails: Fails) -> None:
    root = Path(shutil.copytree(run.parent / "data", tmp_path / "data"))
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    line = fails("report", run, "--root", root, "--cpu", "--out", tmp_path / "report.html")
    assert "have 4 classes now, the run has 3; say with --root" in line


@pytest.mark.slow
def test_names_that_the_terminal_cannot_encode(run: Path, tmp_path: Path) -> None:
    """Class names and files with letters outside of ASCII, and with bytes that are no UTF-8."""
    root = Path(shutil.copytree(run.parent / "data", tmp_path / "data"))
    (root / "classes.txt").unlink()
    (root / "classes.json").write_text(json.dumps(["道路", "\ud800", "\udcff"]))
    for kind in ("images", "labels"):
        for path in list((root / kind / "val").iterdir()):
            path.rename(path.with_name(os.fsdecode(b"\xff\xe9") + "é" + path.name))
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    scores, images = tmp_path / "scores.json", root / "images" / "val"
    code = f"""if True:
        import sys
        from mcibi_fast import cli
        for command in (
            ["data", "check", {str(root)!r}, "--out", {str(tmp_path / "check")!r}],
            ["evaluate", {str(copy)!r}, "--root", {str(root)!r}, "--cpu", "--workers", "0",
             "--json", {str(scores)!r}],
            ["predict", {str(copy)!r}, {str(images)!r}, "--cpu", "--out", {str(tmp_path / "p")!r}],
            ["report", {str(copy)!r}, "--root", {str(root)!r}, "--cpu", "--out",
             {str(tmp_path / "report.html")!r}],
        ):
            assert cli.main([*command, "--quiet"]) == 0, command
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        cwd=Path(cli.__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode("ascii")
    assert "no problems" in printed and printed.count(r"\u9053\u8def") >= 2
    assert json.loads(scores.read_bytes())["classes"][1]["class"].endswith("\ud800")
    assert "道路" in (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert len(list((tmp_path / "p" / "labels").iterdir())) == 2


@pytest.mark.slow
def test_a_program_that_cannot_be_saved_with_free_sizes(
    run: Path, tmp_path: Path, fails: Fails
) -> None:
    """The pooling of test_resnet, as of resnet26d, ResNeSt and ConvNeXt, rounds up."""
    line = fails("export", run, tmp_path / "model.pt2")
    assert "this model for images of any size cannot be saved as .pt2 (Failed serializing" in line
    assert "give a size, which is then fixed (--size H,W)" in line
    assert not list(tmp_path.iterdir())
    assert cli.main(["export", str(run), str(tmp_path / "model.pt2"), "--size", "64,64"]) == 0
