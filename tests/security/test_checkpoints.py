"""Weights and training states of someone else: no code, no more memory than the file, one line.

Commands run in a forked process that may take 800 MB and a minute; the attacks ask for tens of
gigabytes, or never end.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mcibi_fast.limits import LIMITS
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import WEIGHTS
from mcibi_fast.training.run import STATE, Run
from tests.commands.test_convert import released_state
from tests.security.entries import RELEASED_ENTRIES, RUN_ENTRIES, entries, refused
from tests.security.forked import Outcome
from tests.security.pickles import attacks, spread

pytestmark = pytest.mark.usefixtures("one_process")
HUGE = 2**20


@pytest.fixture
def run(security_run: Path, security_data: Path) -> Path:
    """A run beside its data, which its configuration names."""
    change_config(security_run, lambda config: config["data"].update(root=str(security_data)))
    return security_run


def change_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = run / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def weights_files(run: Path) -> list[Path]:
    return sorted({path.resolve() for path in run.glob(f"checkpoints/*/{WEIGHTS}")})


def change_spec(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the specification beside the weights, and the options that --resume takes."""
    for file in weights_files(run):
        with safetensors.safe_open(str(file), framework="pt") as stored:
            spec = json.loads(stored.metadata()["mcibi_fast"])
            names = list(stored.keys())
            state = {name: stored.get_tensor(name) for name in names}
        changed = change(spec)
        spec = spec if changed is None else changed
        text = spec if isinstance(spec, str) else json.dumps(spec)
        safetensors.torch.save_file(state, file, metadata={"mcibi_fast": text})
    if isinstance(spec, dict) and isinstance(spec.get("options"), dict):
        model = {"options": spec["options"], "backbone": spec.get("backbone")}
        change_config(run, lambda config: config["model"].update(model))


def option(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["options"].update({name: value})


def field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec.update({name: value})


def many_classes(spec: dict[str, Any]) -> None:
    spec["classes"] = [f"{k}" for k in range(20_000)]
    spec["palette"] = [[0, 0, 0]] * 20_000


RESNET = {"bottleneck": False, "stem_width": 4, "depths": [1] * 4, "channels": [4] * 4}
SWIN = {"width": 8, "depths": [1] * 4, "heads": [1] * 4, "window_size": 4}

# What a file asks for, and a part of the error. Options reach every entry point.
GIGANTIC: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "channels": (option("feats_channels", HUGE), "has shape"),
    "more channels": (option("feats_channels", 2**62), "size"),
    "other channels": (option("transform_channels", HUGE), "has shape"),
    "noise besides the weights": (option("feats_channels", 2**28), "MAX_TRANSIENT_BYTES"),
    "a kernel": (option("kernel_sizes", [1, 1, 10_001]), "has shape"),
    "stages": (option("stages", 10**9), "MAX_CONFIG_STAGES"),
    "past frames": (option("history", 10**9), "history"),
    "blocks": (
        field("backbone", f"released_resnet {json.dumps(RESNET | {'depths': [10**9] + [1] * 3})}"),
        "MAX_PARAMETERS",
    ),
    "widths": (
        field("backbone", f"released_resnet {json.dumps(RESNET | {'channels': [2**24] * 4})}"),
        "of another architecture",
    ),
    "a window": (
        field("backbone", f"released_swin {json.dumps(SWIN | {'window_size': 3000})}"),
        "output_stride",
    ),
    "a published backbone": (field("backbone", "vit_giant_patch14_224"), "output_stride"),
}
# Of another type than the model's arguments.
ABSURD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a word for a number": (option("feats_channels", "8"), "feats_channels: expected int"),
    "a fraction": (option("stages", 1.5), "stages: expected int"),
    "a negative number": (option("feats_channels", -8), "no model has such sizes"),
    "a list": (option("dropout", [0.1]), "dropout: expected float"),
    "a word for yes": (option("align_corners", "yes"), "align_corners: expected bool"),
    "no such choice": (option("form", "other"), "form: expected one of paper, released"),
    "a module": (option("within_image", "os.system"), "within_image: expected"),
    "no such option": (option("shell", "touch x"), "shell"),
    "a nested list": (option("kernel_sizes", [[1], [1], [1]]), "kernel_sizes: expected"),
}
# Wrong in the specification alone; --resume takes its own from config.json and the data.
SPECIFICATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "classes": (many_classes, "classes"),
    "no name": (field("name", None), "name: expected str"),
    "no such framework": (field("name", "x" * 10**5), "no model"),
    "a number of classes": (field("classes", 3), "classes: expected a list"),
    "no classes": (field("classes", []), "0 classes"),
    "colours out of range": (field("palette", [[0, 0, 300]] * 3), "palette"),
    "colours too few": (field("palette", [[0, 0, 0]]), "3 classes and 1 colours"),
    "a mean that is none": (field("mean", [float("nan")] * 3), "mean"),
    "a deviation of zero": (field("std", [0, 0, 0]), "std"),
    "a label": (field("ignore_index", 2**70), "ignore_index"),
    "options": (field("options", ["x"]), "options: expected"),
    "a field missing": (lambda spec: spec.pop("mean") and None, "it has no 'mean'"),
    "deep nesting": (lambda spec: "[" * 10**5, "nested too deeply"),
    "long": (lambda spec: json.dumps(spec | {"x": "y" * 2**20}), "MAX_JSON_BYTES"),
    "no JSON": (lambda spec: "{", "not JSON"),
    "no dictionary": (lambda spec: "[]", "it is no dictionary"),
    "a long number": (lambda spec: '{"name": ' + "1" * 5000 + "}", "not JSON"),
}


@pytest.mark.parametrize("entry", entries())
@pytest.mark.parametrize("attack", [*GIGANTIC, *ABSURD])
@pytest.mark.thinned(always={"entry": ["evaluate"]})
def test_options(attack: str, entry: str, run: Path) -> None:
    change, expected = (GIGANTIC | ABSURD)[attack]
    change_spec(run, change)
    refused(RUN_ENTRIES[entry](run), expected)


@pytest.mark.parametrize("entry", entries("train --resume"))
@pytest.mark.parametrize("attack", SPECIFICATIONS)
@pytest.mark.thinned(always={"entry": ["evaluate"]})
def test_specifications(attack: str, entry: str, run: Path) -> None:
    change, expected = SPECIFICATIONS[attack]
    change_spec(run, change)
    refused(RUN_ENTRIES[entry](run), expected)


def header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


def tensors(count: int) -> bytes:
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    spec = '"__metadata__":{"mcibi_fast":"{}"}'
    text = "{" + ",".join([spec, *(entry.format(i) for i in range(count))]) + "}"
    return header(len(text), text.encode())


FILES: dict[str, bytes] = {
    "empty": b"",
    "a long header": header(2**40),
    "a header over the library's limit": header(10**8 + 1, b" " * 1000),
    "nothing but a header": header(2),
    "deep nesting": header(10**6, b"[" * 10**6),
    "values that are not there": header(
        *(lambda text: (len(text), text))(
            b'{"a":{"dtype":"F32","shape":[4000000000],"data_offsets":[0,16000000000]}}'
        )
    ),
    "a pickle": b"\x80\x02cposix\nsystem\n",
}


@pytest.mark.parametrize("entry", entries())
@pytest.mark.parametrize("file", FILES)
@pytest.mark.thinned(always={"entry": ["evaluate"]})
def test_files_of_weights(file: str, entry: str, run: Path) -> None:
    for path in weights_files(run):
        path.write_bytes(FILES[file])
    line = refused(RUN_ENTRIES[entry](run))
    assert any(text in line for text in ("not a checkpoint of mcibi_fast", "damaged", "it has no"))


@pytest.mark.parametrize("entry", entries())
@pytest.mark.thinned(only={"entry": ["evaluate", "train --resume", "models.hub"]})
def test_too_many_tensors(entry: str, run: Path) -> None:
    with safetensors.safe_open(str(weights_files(run)[0]), framework="pt") as stored:
        spec = stored.metadata()["mcibi_fast"]
    state = {f"{i}": torch.zeros(0) for i in range(20_001)}
    for path in weights_files(run):
        safetensors.torch.save_file(state, path, metadata={"mcibi_fast": spec})
    refused(RUN_ENTRIES[entry](run), "MAX_TENSORS (20,000)")


@pytest.mark.parametrize("attack", attacks(Path("x")))
@pytest.mark.parametrize("place", ["optimizer", "random", "weights"])
@pytest.mark.thinned(always={"place": ["weights"]})
def test_training_states(attack: str, place: str, run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    make, expected = attacks(marker)[attack]
    change_state(run, **{place: make()})
    refused(RUN_ENTRIES["train --resume"](run), STATE, "is damaged", expected)
    assert not marker.exists()


def change_state(run: Path, drop: str | None = None, **changes: Any) -> None:
    weights, state = Run(run).load_state()
    state |= changes
    if drop is not None:
        del state[drop]
    torch.save(state, weights.with_name(STATE))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"step": -1},
        {"step": 10**12},
        {"step": 0.5},
        {"step": None},
        {"seconds": "long"},
        {"seconds": torch.zeros(2)},
        {"random": 3},
        {"random": [3]},
        {"random": [{"torch": torch.zeros(2), "cuda": [], "python": [], "numpy": []}]},
        {"transient_buffers": {}},
        {"transient_buffers": [1]},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": [1]},
        {"drop": "optimizer"},
        {"drop": "step"},
    ],
    ids=str,
)
def test_training_states_of_other_types(changes: dict[str, Any], run: Path) -> None:
    change_state(run, **changes)
    refused(RUN_ENTRIES["train --resume"](run), "resume: ")


def test_an_optimizer_of_another_model(run: Path) -> None:
    _, state = Run(run).load_state()
    optimizer = state["optimizer"]
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(3)
    change_state(run, optimizer=optimizer, step=0)
    refused(RUN_ENTRIES["train --resume"](run), "momentum_buffer has shape (3,)")
    optimizer["param_groups"][0]["lr"] = "fast"
    change_state(run, optimizer=optimizer, step=0)
    refused(RUN_ENTRIES["train --resume"](run), "the optimizer's lr is a str")


@pytest.mark.parametrize("entry", entries())
@pytest.mark.parametrize("file", ["config.json", "history.jsonl", WEIGHTS, STATE])
@pytest.mark.thinned
def test_pipes_without_end(file: str, entry: str, run: Path) -> None:
    """Nobody writes to these FIFOs: opening one without care would wait for ever."""
    for path in [*run.rglob(file)]:
        if path.is_file():
            path.unlink()
            os.mkfifo(path)
    outcome = RUN_ENTRIES[entry](run)  # in time
    assert outcome.value in (0, 2, None)
    assert outcome.error == "" or outcome.error.startswith(("ValueError: ", "FileNotFoundError: "))


# --- the authors' checkpoints --------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    return released_state("fcn_mcibipp")


def enter(entry: str, folder: Path, content: Any, *, zipped: bool = True) -> Outcome:
    file = folder / "released.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return RELEASED_ENTRIES[entry](file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("entry", RELEASED_ENTRIES)
@pytest.mark.parametrize("attack", attacks(Path("x")))
@pytest.mark.thinned
def test_released_checkpoints(
    attack: str,
    entry: str,
    zipped: bool,
    released: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    marker = tmp_path / "owned"
    make, expected = attacks(marker)[attack]
    content = {"model": released | {"decoder_cls.conv2.bias": make()}}
    outcome = enter(entry, tmp_path, content, zipped=zipped)
    refused(outcome, "torch cannot load", expected)
    assert not marker.exists() and not (tmp_path / "converted.safetensors").exists()


RELEASED: dict[str, tuple[dict[Any, Any], str]] = {
    "no values, many channels": (
        {"bottleneck.0.weight": torch.zeros(2**20, 0, 3, 3)},
        "do not fit the model",
    ),
    "no values, a wide backbone": (
        {"backbone_net.stem.0.weight": torch.zeros(2**20, 0, 3, 3)},
        "do not fit the model",
    ),
    "a number": ({"bottleneck.0.weight": torch.tensor(1.0)}, "checkpoint: "),
    "a vector": ({"memory_module.memory": torch.zeros(0)}, "checkpoint: "),
    "a key that is no name": ({3: torch.zeros(1)}, "its entry 3 is no tensor with a name"),
    "an entry that is no tensor": ({"x": [1]}, "its entry 'x' is no tensor with a name"),
    "many laterals": (
        {f"lateral_convs.{i}.0.weight": torch.zeros(0) for i in range(20_000)},
        "MAX_TENSORS",
    ),
    "many stages": (
        {"backbone_net.patch_embed.projection.weight": torch.zeros(8, 3, 4, 4)}
        | {f"backbone_net.stages.{i}.blocks.0.x": torch.zeros(0) for i in range(15_000)},
        "MAX_STAGES",
    ),
    "a ResNeSt without channels": (
        {
            "backbone_net.layer1.0.conv2.fc1.weight": torch.zeros(0),
            "backbone_net.layer1.0.conv2.conv.weight": torch.zeros(4, 0),
            "backbone_net.layer1.0.conv3.weight": torch.zeros(4, 0),
        },
        "have shapes that no resnest has",
    ),
}


@pytest.mark.parametrize("entry", RELEASED_ENTRIES)
@pytest.mark.parametrize("attack", RELEASED)
@pytest.mark.thinned
def test_released_shapes(
    attack: str, entry: str, released: dict[str, Tensor], tmp_path: Path
) -> None:
    changes, expected = RELEASED[attack]
    refused(enter(entry, tmp_path, {"model": released | changes}), expected)


def test_a_mapping_in_memory_is_checked_too(released: dict[str, Tensor]) -> None:
    from mcibi_fast.compat import sssegmentation

    with pytest.raises(ValueError, match="with 1 values"):
        sssegmentation.load({"model": released | {"x": spread(10**10)}})


def test_limits_can_be_raised(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_spec(run, option("stages", 200))
    with pytest.raises(ValueError, match=r"MCIBI_FAST_MAX_CONFIG_STAGES"):
        load_model(run)
    monkeypatch.setenv("MCIBI_FAST_MAX_CONFIG_STAGES", "200")
    assert load_model(run)[1].options["stages"] == 200
    change_state(run, seconds=[0.0] * 10)
    monkeypatch.setenv("MCIBI_FAST_MAX_ENTRIES", "10")
    with pytest.raises(ValueError, match=r"MAX_ENTRIES \(10\)"):
        Run(run).load_state()


def test_every_limit_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    named = {name for name in LIMITS if f"`{name}`" in text}
    assert named == {name for name in LIMITS if not name.startswith("MAX_CONFIG_")} | {
        "MAX_CONFIG_STAGES"
    }
