"""A run's config.json and history are a stranger's: nothing is run or fetched, and errors are one
line that names the file.
"""

from __future__ import annotations

import json
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcibi_fast.models import hub
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes import ShardsData, TrainConfig
from mcibi_fast.recipes.sources import StoredShardsData, relocated
from mcibi_fast.training.history import read_history
from mcibi_fast.training.run import Run
from tests.security.entries import RUN_ENTRIES, entries, refused
from tests.security.forked import Outcome, command

pytestmark = pytest.mark.usefixtures("one_process")
WITH_DATA = ("evaluate", "report", "train --resume")  # these read the data that the run names
WITHOUT_DATA = ("predict", "video", "export", "models.hub")
READ_CONFIG = ("evaluate", "predict", "video", "report", "train --resume")


@pytest.fixture
def run(security_run: Path, security_data: Path) -> Path:
    change(security_run, data={"root": str(security_data)})
    return security_run


def change(run: Path, **parts: Any) -> None:
    """Changes fields of a run's configuration; those of its parts as dictionaries."""
    file = run / "config.json"
    config = json.loads(file.read_text())
    for name, value in parts.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            config[name] |= value
        else:
            config[name] = value
    file.write_text(json.dumps(config))


def on_shards(run: Path, root: str, **more: Any) -> None:
    """Turns the run into one on shards."""
    config = json.loads((run / "config.json").read_text())
    config["data"] = {"kind": "ShardsData", "root": root, **more}
    (run / "config.json").write_text(json.dumps(config))


# --- commands and addresses ----------------------------------------------------------------------


def touching(marker: Path) -> list[str]:
    """Roots that are commands, or that a careless shell would take for one."""
    return [
        f"pipe:touch {marker}; cat {{}}",
        f"pipe:touch {marker}",
        f"http://127.0.0.1:9/'; touch {marker}; '",
        f"http://127.0.0.1:9/$(touch {marker})",
        f"file://{marker}",
    ]


@pytest.mark.parametrize("entry", entries())
@pytest.mark.parametrize("number", range(len(touching(Path("x")))))
@pytest.mark.thinned(always={"entry": ["evaluate"]})
def test_no_command_of_a_file_is_run(number: int, entry: str, run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    root = touching(marker)[number]
    on_shards(run, root)
    outcome = RUN_ENTRIES[entry](run)
    if entry in WITH_DATA:
        kind = "a command" if root.startswith("pipe:") else "a URL"
        line = refused(outcome, f"is {kind} named by", "give it with --root")
        assert line.count("data.root") == 1
    else:
        assert outcome.value in (0, None) and not outcome.error, outcome
    assert not marker.exists()


@pytest.mark.parametrize("entry", entries())
@pytest.mark.parametrize("kind", ["FolderData", "NamedData", "VideoData"])
@pytest.mark.thinned
def test_other_kinds_of_data_know_no_commands(
    kind: str, entry: str, run: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "owned"
    name = {"NamedData": {"name": "ade20k"}, "VideoData": {"name": "vspw"}}.get(kind, {})
    config = json.loads((run / "config.json").read_text())
    config["data"] = {"kind": kind, "root": f"pipe:touch {marker}; cat {{}}", **name}
    (run / "config.json").write_text(json.dumps(config))
    outcome = RUN_ENTRIES[entry](run)
    if entry in WITH_DATA:
        refused(outcome)
    assert not marker.exists()


@pytest.mark.parametrize("entry", ["predict", "video"])
def test_mirrored_images_do_not_ask_the_shards(entry: str, run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    on_shards(run, f"pipe:touch {marker}; cat {{}}")
    change(run, inference={"flip": True})
    refused(RUN_ENTRIES[entry](run), "--flip", "give --no-flip")
    assert not marker.exists()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and a list of the first lines of the requests it received."""
    asked: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline().decode())
            self.wfile.write(b"HTTP/1.0 404 Not Found\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/shards", asked
        running.shutdown()


@pytest.mark.parametrize("entry", entries())
def test_no_address_of_a_file_is_fetched(
    entry: str, run: Path, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    on_shards(run, address)
    outcome = RUN_ENTRIES[entry](run)
    if entry in WITH_DATA:
        refused(outcome, "is a URL named by", "give it with --root")
    assert asked == []


def test_the_user_may_name_an_address(run: Path, server: tuple[str, list[str]]) -> None:
    pytest.importorskip("webdataset", reason="needs webdataset to fetch shards")
    address, asked = server
    on_shards(run, address)
    refused(command("evaluate", run, "--cpu", "--root", address, seconds=200), "cannot be fetched")
    assert asked and all("/shards/val/index.json" in line for line in asked)


def shards_of(run: Path, data: Path, out: Path) -> Path:
    """The data packed, and the run on them."""
    pytest.importorskip("webdataset", reason="needs webdataset to write shards")
    outcome = command("data", "pack", data, out, "--workers", "0", "--quiet", seconds=60)
    assert outcome.value == 0, outcome
    return out


@pytest.mark.parametrize("entry", WITH_DATA)
def test_what_the_user_says_takes_its_place(
    entry: str, run: Path, security_data: Path, tmp_path: Path
) -> None:
    """--root with a folder, with shards, and with a command of one's own."""
    shards = shards_of(run, security_data, tmp_path / "shards")
    marker, own = tmp_path / "owned", tmp_path / "own"
    on_shards(run, f"pipe:touch {marker}; cat {{}}", cache=str(tmp_path / "cache"))
    words: dict[str, list[Any]] = {
        "evaluate": ["evaluate", run, "--cpu", "--workers", "0"],
        "report": ["report", run, "--cpu"],
        "train --resume": ["train", "--resume", run],
    }
    roots = [f"pipe:touch {own}; cat {shards}/{{}}", shards]
    if entry == "evaluate":
        roots.append(security_data)
    for root in roots:
        outcome = command(*words[entry], "--quiet", "--root", root, seconds=60, megabytes=800)
        assert outcome.value == 0, outcome
    assert own.exists() and not marker.exists()


def test_python_may_name_a_command(tmp_path: Path) -> None:
    """In Python nothing is refused; only `TrainConfig.from_dict` reads what may be a file's."""
    config = TrainConfig(data=ShardsData("pipe:cat x/{}"))
    stored = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(stored.data) is StoredShardsData and stored.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"pipe:cat x/\{\} is a command"):
        stored.data.dataset("train")
    assert type(relocated(stored.data, "pipe:cat x/{}")) is ShardsData
    again = TrainConfig.from_dict(json.loads(json.dumps(stored.to_dict())))
    assert type(again.data) is StoredShardsData  # also after a second reading
    local = TrainConfig(data=ShardsData(str(tmp_path)))
    assert TrainConfig.from_dict(json.loads(json.dumps(local.to_dict()))) == local


# --- where a configuration is looked for ---------------------------------------------------------


def test_only_in_the_layout_of_a_run(run: Path, security_data: Path, tmp_path: Path) -> None:
    """A config.json two folders above a file of weights belongs to somebody else."""
    weights = tmp_path / "shared" / "a" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "best" / "model.safetensors", weights)
    for folder in (tmp_path, tmp_path / "shared"):
        (folder / "config.json").write_text("no configuration")
    arguments = ["evaluate", weights, "--cpu", "--workers", "0", "--quiet"]
    refused(command(*arguments), "name the data with --root")
    assert command(*arguments, "--root", security_data).value == 0


def test_a_folder_of_the_hub_is_no_run(run: Path, security_data: Path, tmp_path: Path) -> None:
    hub.save_pretrained(*load_model(run), tmp_path / "hub")
    arguments = ["evaluate", tmp_path / "hub", "--cpu", "--workers", "0", "--quiet"]
    assert command(*arguments, "--root", security_data).value == 0
    (tmp_path / "hub" / "config.json").write_text("[" * 10**5)
    refused(command(*arguments, "--root", security_data), "config.json", "nested too deeply")


def test_checkpoints_are_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (run / "checkpoints").rename(other)
    (other / "step-00000001").mkdir()
    (run / "checkpoints").symlink_to(other)
    refused(RUN_ENTRIES["train --resume"](run), "is a link, and runs are not written through links")
    assert (other / "step-00000001").is_dir()
    assert RUN_ENTRIES["models.hub"](run).error == ""  # reading is another matter


# --- what is in it -------------------------------------------------------------------------------

TEXTS = {
    "empty": "",
    "cut off": '{"data": {"kind": "Sce',
    "deep nesting": '{"data": ' + "[" * 10**5,
    "a list": "[]",
    "a number": "3",
    "not UTF-8": "\udcff",
    "long": '{"x": "' + "y" * 2**21 + '"}',
    "no fields": "{}",
    "a long number": '{"epochs": ' + "1" * 10**5 + "}",
}


@pytest.mark.parametrize("entry", READ_CONFIG)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.thinned
def test_what_is_no_configuration(text: str, entry: str, run: Path) -> None:
    (run / "config.json").write_text(TEXTS[text], errors="surrogateescape")
    refused(RUN_ENTRIES[entry](run), "config.json")


VALUES: dict[str, dict[str, Any]] = {
    "a word for a number": {"epochs": "many"},
    "a number for a word": {"device": 3},
    "a fraction": {"batch_size": 1.5},
    "yes for a number": {"workers": True},
    "no such choice": {"mixed_precision": "fp1"},
    "no such field": {"shell": "x"},
    "data of no kind": {"data": 3},
    "data of a strange kind": {"data": {"kind": ["ScenesData"]}},
    "a root that is none": {"data": {"root": ["x"]}},
    "classes that are none": {"data": {"classes": 3}},
    "a model that is none": {"model": []},
    "a name that is none": {"model": {"name": 3}},
    "options that are none": {"model": {"options": [1]}},
    "a history that is none": {"model": {"options": {"history": "2"}}},
    "a window of words": {"inference": {"window": ["a", "b"]}},
    "a window of one side": {"inference": {"window": [1]}},
    "part of the settings": {"inference": 3},
    "too many workers": {"workers": 10**6},
    "a gigantic window": {"inference": {"window": [10**6, 10**6]}},
    "a gigantic scale": {"inference": {"scales": [1e9]}},
    "stages without end": {"inference": {"stages": 10**9}},
    "a batch without end": {"eval_batch_size": 10**9},
    "a crop without end": {"augmentation": {"crop_size": [10**6, 10**6]}},
    "a scale without end": {"augmentation": {"scale": [1, 1e9]}},
}


@pytest.mark.parametrize("entry", READ_CONFIG)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.thinned
def test_values_of_another_type_or_size(value: str, entry: str, run: Path) -> None:
    change(run, **VALUES[value])
    line = refused(RUN_ENTRIES[entry](run), "config.json: not a training configuration")
    assert ("MAX_CONFIG_" in line) == any(w in value for w in ("gigantic", "without", "too"))


def test_limits_can_be_raised(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(run, inference={"stages": 1000})
    with pytest.raises(ValueError, match=r"MCIBI_FAST_MAX_CONFIG_STAGES"):
        Run(run).settings()
    monkeypatch.setenv("MCIBI_FAST_MAX_CONFIG_STAGES", "1000")
    assert Run(run).settings().inference.stages == 1000


# --- the history ---------------------------------------------------------------------------------

METRICS = {"mean_iou": 0.5, "classes": [{"class": "a", "iou": 0.5}]}
LINES: dict[str, Any] = {
    "a list": [],
    "a number": 3,
    "no step": {"loss": 1.0},
    "a negative step": {"step": -1},
    "a step without end": {"step": 10**300},
    "a step of words": {"step": "1"},
    "yes": {"step": True},
    "a loss of words": {"step": 1, "loss": "x"},
    "losses in a list": {"step": 1, "losses": [1]},
    "a loss without end": {"step": 1, "losses": {"x": 10**400}},
    "a nested loss": {"step": 1, "losses": {"x": {"y": 1}}},
    "an epoch": {"step": 1, "epoch": {}},
    "a rate": {"step": 1, "lr": None},
    "a memory": {"step": 1, "memory": 3},
    "a memory of words": {"step": 1, "memory": {"mean": ["x"], "std": ["y"]}},
    "a memory without deviation": {"step": 1, "memory": {"mean": [1, 2], "std": [1]}},
    "scores": {"step": 1, "metrics": []},
    "scores without classes": {"step": 1, "metrics": {"mean_iou": 1}},
    "scores without a mean": {"step": 1, "metrics": {"classes": []}},
    "scores of words": {"step": 1, "metrics": METRICS | {"pixel_accuracy": "x"}},
    "a class that is none": {"step": 1, "metrics": METRICS | {"classes": [3]}},
    "a class without a name": {"step": 1, "metrics": METRICS | {"classes": [{"iou": 1}]}},
}


@pytest.mark.parametrize("entry", ["report", "train --resume"])
@pytest.mark.parametrize("line", [*LINES, "no JSON", "deep nesting"])
@pytest.mark.thinned
def test_lines_of_the_history(line: str, entry: str, run: Path) -> None:
    texts = {"no JSON": "{", "deep nesting": "[" * 10**5}
    text = texts.get(line) or json.dumps(LINES[line])
    with (run / "history.jsonl").open("a") as file:
        file.write(text + "\n")
    number = len((run / "history.jsonl").read_text().splitlines())
    refused(RUN_ENTRIES[entry](run), f"history.jsonl, line {number}: no line of a run's history")


def test_numbers_of_a_history_that_are_none(tmp_path: Path) -> None:
    """NaN and infinity count as numbers, and a last line that a crash cut short is left out."""
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1, "loss": NaN, "losses": {"a": Infinity}}\n{"step": 2, "lo')
    (entry,) = read_history(file)
    assert entry["loss"] != entry["loss"] and entry["losses"]["a"] > 1e308


def test_a_history_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIBI_FAST_MAX_HISTORY_BYTES", "1000")
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n' * 100)
    with pytest.raises(ValueError, match=r"has 1,200 bytes, more than MAX_HISTORY_BYTES \(1,000\)"):
        read_history(tmp_path / "history.jsonl")


def test_scores_of_other_classes(run: Path) -> None:
    Run(run).record(step=2, epoch=1, metrics=METRICS)
    outcome: Callable[[Path], Outcome] = RUN_ENTRIES["report"]
    refused(outcome(run), "has scores of 1 classes, the checkpoint has 3")
