"""The command line: what it prints, what it leaves, and one clear line for bad input."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli, files
from mcibi_fast.extras import EXTRAS

COMMANDS = (
    "",
    "train",
    "evaluate",
    "predict",
    "report",
    "serve",
    "video",
    "convert",
    "export",
    "data",
    "data check",
    "data convert",
    "data pack",
    "demo",
    "ablate",
    "bench",
    "models",
    "info",
)
TINY = (
    "model.backbone=test_resnet",
    "model.options.feats_channels=8",
    "model.options.transform_channels=8",
    "epochs=1",
    "batch_size=2",
    "device=cpu",
    "workers=0",
    "augmentation.crop_size=[32,32]",
)
pytestmark = pytest.mark.usefixtures("one_process")


def write_dataset(root: Path, *, classes: int = 3, count: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = rng.integers(classes, size=(5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            image = (label[..., None] * 70 + rng.integers(40, size=(40, 48, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(f"thing {k}" for k in range(classes)))
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory; tests only read it."""
    base = tmp_path_factory.mktemp("trained")
    out, root = base / "run", write_dataset(base / "data")
    settings = ["--set", *TINY, "device=cpu"]
    assert cli.main(["train", "folder", "--root", str(root), "--out", str(out), *settings]) == 0
    return out


Fails = Callable[..., str]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    examples = [line.strip() for line in lines[lines.index("examples:") + 1 :]]
    if not command:
        examples = examples[: examples.index("")]
    assert len(examples) >= 2
    for example in examples:  # each is a line that the program takes
        words = shlex.split(example)
        at = words.index("mcibi-fast") + 1
        assert words[at : at + len(command.split())] == command.split()
        cli.build_parser().parse_args(words[at:])


def test_the_shell_completes(tmp_path: Path) -> None:
    """As the function of argcomplete asks that `register-python-argcomplete` prints."""
    pytest.importorskip("argcomplete")
    found = tmp_path / "found"
    for line, expected in (
        ("mcibi-fast eva", "evaluate"),
        ("mcibi-fast train --fra", "--framework"),
    ):
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": "\n"}
        subprocess.run([sys.executable, "-m", "mcibi_fast.cli"], env=os.environ | asked)
        assert found.read_text().split() == [expected]


def test_help_imports_no_heavy_package() -> None:
    """Of any command: it answers at once."""
    heavy = {"torch", "numpy"}.union(*EXTRAS.values())
    code = f"""if True:
        import sys
        from mcibi_fast import cli
        for command in {COMMANDS}:
            try:
                cli.main([*command.split(), "--help"])
            except SystemExit as stop:
                assert stop.code == 0
        print(sorted({heavy} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: mcibi-fast") == len(COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


def test_train_evaluate_predict(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores.json"
    assert cli.main(["evaluate", str(trained), "--cpu", "--json", str(scores)]) == 0
    printed = capsys.readouterr().out
    assert "thing 2" in printed and "mIoU (present)" in printed
    history = [json.loads(line) for line in (trained / "history.jsonl").open()]
    assert history[-1]["metrics"].items() <= json.loads(scores.read_text()).items()

    source = trained.parent / "data" / "images" / "val"
    assert cli.main(["predict", str(trained), str(source), "--out", str(tmp_path), "--cpu"]) == 0
    assert "4 label maps" in capsys.readouterr().out
    label = np.array(Image.open(tmp_path / "labels" / "3.png"))
    assert label.shape == (40, 48) and label.max() < 3
    assert Image.open(tmp_path / "overlays" / "3.png").size == (48, 40)


def test_evaluate_a_folder_without_class_list(trained: Path, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "other", classes=2)  # the third class never occurs there
    (root / "classes.txt").unlink()
    assert cli.main(["evaluate", str(trained), "--root", str(root), "--cpu"]) == 0


def test_show_prints_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "scenes", "--show", "--set", "epochs=3", "optimizer.lr=0.5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["epochs"] == 3 and shown["optimizer"]["lr"] == 0.5


def test_framework_backbone_and_memory(
    capfd: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path, fails: Fails
) -> None:
    options = ["--framework", "upernet", "--backbone", "resnest101e", "--without-memory"]
    settings = ["--set", "optimizer.lr=0.003"]
    assert (
        cli.main(["train", "ade20k", "--root", str(tmp_path), *options, *settings, "--show"]) == 0
    )
    shown = json.loads(capfd.readouterr().out)
    assert shown["model"] == {
        "framework": "upernet",
        "backbone": "resnest101e",
        "options": {},
        "memory": None,
        "history": 0,
        "method": None,
    }
    assert (shown["epochs"], shown["optimizer"]["lr"]) == (180, 0.003)
    line = fails("train", "demo", "--without-memory")
    assert "--without-memory: the recipe demo has its own model" in line
    arguments = ["--root", str(dataset), "--framework", "unet", "--set", "batch_size=2"]
    assert "no model 'unet'; there are" in fails("train", "folder", *arguments)
    assert "give nothing else" in fails("train", "--resume", "x", "--backbone", "resnet18")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ema=1.5", "ema: expected a decay of at least 0, less than 1, got 1.5"),
        ("accumulate=0", "accumulate: expected at least 1, got 0"),
        ("accumulate=3", "batch_size: 2 is not a multiple of accumulate=3"),
        ("loss.class_weights=[1,2]", "loss.class_weights: 2 weights, but the data has 3 classes"),
        ("adversarial.epsilon=-1", "adversarial.epsilon: expected 0 or more, in 1/255, got -1"),
        ("augmentation.style_mixing=2", "style_mixing: 2.0 is no probability in 0..1"),
    ],
)
def test_training_options_that_make_no_sense(
    fails: Fails, dataset: Path, tmp_path: Path, setting: str, message: str
) -> None:
    out = str(tmp_path / "run")
    settings = ["--set", *TINY, setting]
    line = fails("train", "folder", "--root", str(dataset), "--out", out, *settings)
    assert message in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "torch running" in printed and "reference" in printed


@pytest.mark.slow
def test_bench_lists_and_passes_arguments_on(capfd: pytest.CaptureFixture[str]) -> None:
    if not (Path(cli.__file__).parents[1] / "benchmarks").is_dir():
        pytest.skip("needs the benchmarks of a checkout")
    assert cli.main(["bench"]) == 0
    assert "memory_update" in capfd.readouterr().out.split()
    assert cli.main(["bench", "memory_update", "--help"]) == 0
    assert "--quick" in capfd.readouterr().out
    assert cli.main(["bench", "memory_update", "--nonsense"]) == 2


def test_data_check(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: Fails
) -> None:
    arguments = ["data", "check", str(dataset), "--out", str(tmp_path / "overlays")]
    assert cli.main(arguments) == 0
    assert "thing 1" in capfd.readouterr().out
    assert len(list((tmp_path / "overlays").iterdir())) == 4
    (dataset / "labels" / "val" / "2.png").unlink()
    assert "labels/val/2.png: missing mask" in fails(*arguments)


def test_bad_usage(fails: Fails, trained: Path, tmp_path: Path) -> None:
    assert "no such field; did you mean optimizer.lr?" in fails("train", "demo", "--set", "lr=1")
    assert "no recipe 'camvit'" in fails("train", "camvit")
    assert "no recipe given" in fails("train")
    assert "give it with --root" in fails("train", "folder")
    assert "invalid choice: 'trian'" in fails("trian")
    assert "COMMAND" in fails()
    assert "own settings" in fails("train", "demo", "--resume", str(trained))
    assert "holds no run" in fails("train", "--resume", str(tmp_path))
    assert "already holds a run" in fails("train", "demo", "--out", str(trained), "--set", *TINY)
    assert "--seeds: expected at least 1" in fails("demo", "--seeds", "0")
    assert "reads no folder" in fails("train", "demo", "--root", str(tmp_path))
    assert "no benchmark 'nothing'" in fails("bench", "nothing")


def test_missing_paths(fails: Fails, trained: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert "nowhere is not a folder" in fails("train", "folder", "--root", nowhere)
    assert "nowhere does not exist" in fails("evaluate", nowhere)
    assert "nowhere" in fails("evaluate", str(trained), "--root", nowhere)
    assert "source: " in fails("predict", str(trained), nowhere, "--cpu")
    assert "nowhere" in fails("data", "check", nowhere)
    assert "no split 'tset'" in fails("evaluate", str(trained), "--split", "tset")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["corrupt", "missing", "label"])
def test_bad_data(fails: Fails, dataset: Path, tmp_path: Path, fault: str, workers: int) -> None:
    image, label = dataset / "images" / "train" / "1.jpg", dataset / "labels" / "train" / "1.png"
    if fault == "corrupt":
        image.write_bytes(image.read_bytes()[:400])
        expected = "images/train/1.jpg: cannot be decoded"
    elif fault == "missing":
        label.unlink()
        expected = "labels/train/1.png: missing mask"
    else:
        pixels = np.array(Image.open(label))
        pixels[3, 4] = 200
        Image.fromarray(pixels).save(label)
        (dataset / "classes.txt").write_text("\n".join(f"c{k}" for k in range(19)))
        expected = "labels/train/1.png: label 200 with 19 classes"
    arguments = ["train", "folder", "--root", str(dataset), "--out", str(tmp_path / "run")]
    assert expected in fails(*arguments, "--set", *TINY, f"workers={workers}")


def test_predict_names_what_it_could_not_read(fails: Fails, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(trained.parent / "data" / "images" / "val", source)
    (source / "2.jpg").write_bytes(b"\xff\xd8\xff")
    out = tmp_path / "out"
    message = fails("predict", str(trained), str(source), "--out", str(out), "--cpu")
    assert "1 unreadable" in message and "2.jpg: cannot be decoded" in message
    assert {p.name for p in (out / "labels").iterdir()} == {"0.png", "1.png", "3.png"}


def test_wrong_checkpoints(fails: Fails, trained: Path, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "four", classes=4)
    message = fails("evaluate", str(trained), "--root", str(root), "--cpu")
    assert "has 3 classes, the data has 4" in message
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, foreign)
    assert "not a checkpoint of mcibi_fast" in fails("evaluate", str(foreign), "--root", str(root))
    assert "not a checkpoint of mcibi_fast" in fails("predict", str(foreign), str(root))

    # A run whose settings were changed by hand to another architecture cannot go on.
    copy = tmp_path / "run"
    shutil.copytree(trained, copy, symlinks=True)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["name"] = "fcn"
    del config["model"]["options"]["transform_channels"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "of another architecture" in fails("train", "--resume", str(copy))
    lone = tmp_path / "lone.safetensors"
    shutil.copy(trained / "checkpoints" / "last" / "model.safetensors", lone)
    assert "name the data with --root" in fails("evaluate", str(lone))


def test_full_disk(
    fails: Fails, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("state.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    out = tmp_path / "run"
    message = fails("train", "folder", "--root", str(dataset), "--out", str(out), "--set", *TINY)
    assert "checkpoint of step 2 not written: No space left on device" in message
    assert not list((out / "checkpoints").iterdir())


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIBI_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe"):
        cli.main(["train", "camvit"])


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from mcibi_fast.commands import info

    monkeypatch.setattr(info, "run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["info"])


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_stop_any_command(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mcibi_fast.commands import info

    before = signal.getsignal(number)
    monkeypatch.setattr(info, "run", lambda args: os.kill(os.getpid(), number))
    assert cli.main(["info"]) == 130
    assert capfd.readouterr().err == "mcibi-fast: interrupted\n"
    assert signal.getsignal(number) is before


# What a module holds is destroyed when Python takes it down.
ENDING = """
import atexit, sys
from mcibi_fast import cli
from mcibi_fast.commands import info

class Held:
    def __del__(self):
        print("taken down", file=sys.stderr)

def run(args):
    atexit.register(print, "exit function")
    print("a line that is not flushed")
    return {status}

info.run, held = run, Held()
sys.argv[1:] = ["info"]
cli.run()
"""


@pytest.mark.parametrize(("status", "expected"), [("0", 0), ("3", 3), ("1 / 0", 1)])
def test_a_command_ends_at_once(status: str, expected: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(status=status)],
        cwd=Path(cli.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected
    assert done.stdout == "a line that is not flushed\nexit function\n"
    assert "taken down" not in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n" if expected == 1 else "")


@pytest.mark.parametrize(("command", "status"), [("train --help", 0), ("train --hepl", 2)])
def test_the_status_of_the_program(command: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mcibi_fast.cli", *command.split()],
        cwd=Path(cli.__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert done.returncode == status
    assert bool(done.stdout) == (status == 0) and bool(done.stderr) == (status == 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(number: signal.Signals, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "folder", "--root", str(dataset), "--out", str(out), "--quiet", "--set"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mcibi_fast.cli", *arguments, *TINY, "epochs=100000", "workers=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not (out / "checkpoints" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # the loaders, too, as a terminal and Slurm do
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("\n") == 1 and "continue with" in err and f"--resume {out}" in err
    from mcibi_fast.training.run import Run

    assert f"step-{Run(out).load_state()[1]['step']:08d} is kept" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["models", "train ade20k --show"])
def test_a_reader_that_has_enough_is_no_error(command: str) -> None:
    """As with `mcibi-fast models | head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mcibi_fast.cli", *command.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
