"""``--config FILE``: a TOML file beside ``--set``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcibi_fast import cli
from mcibi_fast.extras import EXTRAS
from mcibi_fast.recipes.registry import configure


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return str(path)

    return write


FULL = """
recipe = "folder"
root = "photos"
framework = "upernet"
memory = "none"
epochs = 7
ema = 0.9
mixed_precision = "no"
optimizer.lr = 1

[augmentation]
crop_size = [64, 96]

[model]
method = "None"

[model.options]
feats_channels = 32

[inference]
window = [32, 32]
flip = true

[optimizer]
clip_norm = "none"
"""


def test_a_file_says_all(file: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    text = FULL.replace("optimizer.lr = 1", "").replace("[optimizer]", "[optimizer]\nlr = 1")
    config = configure(None, None, [], file=file(text))
    assert config.data.root == str(tmp_path / "photos")  # from the file's folder
    assert (config.model.framework, config.model.memory) == ("upernet", None)
    assert (config.epochs, config.ema) == (7, 0.9)
    assert config.optimizer.lr == 1.0 and type(config.optimizer.lr) is float
    assert config.optimizer.clip_norm is None
    assert config.augmentation.crop_size == (64, 96)  # a tuple, as the recipe's
    assert config.model.method is None
    assert config.model.options["feats_channels"] == 32
    assert config.inference.flip and config.inference.window == (32, 32)


def test_set_and_arguments_come_after_the_file(file: Callable[[str], str], tmp_path: Path) -> None:
    for name in ("photos", "others"):
        (tmp_path / name).mkdir()
    path = file('recipe = "ade20k"\nroot = "photos"\nframework = "upernet"\nepochs = 7')
    config = configure(
        "folder", str(tmp_path / "others"), ["epochs=3"], file=path, framework="pspnet"
    )
    assert config.data.root == str(tmp_path / "others") and config.epochs == 3
    assert config.model.framework == "pspnet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nlearning_rate = 1", "optimizer.learning_rate: no such field"),
        ("[optimiser]\nlr = 0.1", "optimiser.lr: no such field; did you mean optimizer.lr?"),
        ("[optimiser]", "optimiser: no such field; did you mean optimizer."),
        ("epoch = 1", "epoch: no such field; did you mean epochs?"),
        ('recpie = "x"', "recpie: no such field; did you mean recipe?"),
        ("epochs = 1.5", "epochs: expected int"),
        ('epochs = "7"', "epochs: expected int"),
        ("epochs = true", "epochs: expected int"),
        ('[optimizer]\nname = "sdg"', "optimizer.name: expected one of sgd, adamw"),
        ('[optimizer]\nlr = "none"', "optimizer.lr: expected float"),
        ("[augmentation]\ncrop_size = [1, 2, 3]", "augmentation.crop_size: expected 2 numbers"),
        ("optimizer = 1", "optimizer: no such field"),
        ("[model]\nname = 1", "model.name: expected str"),
        ("root = 1", "root: expected a text, got 1"),
        ("epochs =", "not TOML (Invalid value"),
        ("epochs = 1\nepochs = 2", "not TOML (Cannot overwrite a value"),
    ],
)
def test_errors_are_one_line_with_the_file(
    file: Callable[[str], str], text: str, message: str
) -> None:
    path = file(text)
    with pytest.raises(ValueError) as caught:
        configure("scenes", None, [], file=path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(file: Callable[[str], str]) -> None:
    path = file("")
    Path(path).write_bytes(b"epochs = 1 # caf\xe9")
    with pytest.raises(ValueError, match=r"run\.toml: not a text file in UTF-8"):
        configure("scenes", None, [], file=path)


def test_the_command(
    file: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = file('recipe = "scenes"\nepochs = 7\nworkers = 1\n[data]\ntrain_count = 9')
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["train", "--config", path, *out, "--show", "--set", "workers=0"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["epochs"], shown["workers"], shown["data"]["train_count"]) == (7, 0, 9)
    assert cli.main(["train", "scenes", "--config", str(tmp_path / "no.toml"), *out]) == 2
    assert "no.toml" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path), "--config", path]) == 2
    assert "the run's own settings" in capsys.readouterr().err


def test_python_3_10_without_tomli(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("epochs = 1")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setitem(sys.modules, "tomli", None)
    monkeypatch.setitem(EXTRAS, "train", (*EXTRAS["train"], "tomli"))
    with pytest.raises(ImportError, match="--config needs tomli: pip install"):
        configure("scenes", None, [], file=path)
