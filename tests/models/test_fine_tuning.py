"""`pretrained=CHECKPOINT`: a new model begins with the weights of a trained one that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcibi_fast import models
from mcibi_fast.errors import WeightsError
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, find_weights, pack_weights
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config

OPTIONS = {"feats_channels": 8, "transform_channels": 8}
pytestmark = pytest.mark.usefixtures("own_generator")


def trained(folder: Path, name: str = "fcn_mcibipp", backbone: str = "test_resnet") -> Path:
    """A file of a model of three classes, whose weights are no fresh ones."""
    options = OPTIONS if "mcibi" in name else {"feats_channels": 8}
    spec = ModelSpec(name, backbone, options, ["road", "sky", "tree"], [[0, 0, 0]] * 3,
                     [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])  # fmt: skip
    model = create_model(spec)
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values()):
            if value.is_floating_point():
                value.uniform_(0.5, 1.5).add_(number)
    file = folder / f"{name}.safetensors"
    file.write_bytes(pack_weights(model, spec))
    return file


def stored(file: Path) -> dict[str, Tensor]:
    return models.weights.read_weights(file)


def taken(model: models.Segmentor, file: Path) -> set[str]:
    """The modules whose every entry is that of the file; of none is only a part."""
    theirs = stored(file)
    equal: dict[str, list[bool]] = {}
    for name, value in model.state_dict().items():
        same = name in theirs and torch.equal(value, theirs[name])
        equal.setdefault(name.rpartition(".")[0], []).append(same)
    # A step count (num_batches_tracked) of a fresh module is that of the file, too.
    return {module for module, parts in equal.items() if all(parts)}


def test_the_same_model_is_taken_over_whole(tmp_path: Path) -> None:
    file = trained(tmp_path)
    model = models.create("fcn_mcibipp", 3, "test_resnet", pretrained=file, **OPTIONS)
    theirs = stored(file)
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert model.normalisation == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    beginning = model.beginning
    assert beginning is not None and (beginning.fresh, beginning.unused) == ((), ())
    assert str(beginning) == f"begins with {len(theirs)} tensors of {file}"


def test_with_other_classes_only_what_depends_on_them_is_fresh(tmp_path: Path) -> None:
    file = trained(tmp_path)
    model = models.create("fcn_mcibipp", 5, "test_resnet", pretrained=file, **OPTIONS)
    assert model.beginning is not None
    fresh, theirs = set(model.beginning.fresh), stored(file)
    of_classes = {
        name.rpartition(".")[0] for name, value in model.state_dict().items() if 5 in value.shape
    }
    assert fresh == of_classes == set(model.beginning.unused)
    assert "head.context.memory" in fresh
    assert taken(model, file) == {n.rpartition(".")[0] for n in theirs} - fresh
    assert str(model.beginning).count(" more") == 2 * (len(fresh) > 4)


@pytest.mark.parametrize("name", ["fcn_mcibipp", "fcn_mcibi", "pspnet_mcibipp", "deeplabv3"])
def test_another_head_takes_what_it_shares(name: str, tmp_path: Path) -> None:
    file = trained(tmp_path, "fcn")
    options = OPTIONS if "mcibi" in name else {"feats_channels": 8}
    model = models.create(name, 3, "test_resnet", pretrained=file, **options)
    backbone = {n for n, _ in model.named_modules() if n.startswith("backbone.")}
    backbone &= {n.rpartition(".")[0] for n in stored(file)}
    assert backbone <= taken(model, file)
    assert model.beginning is not None and model.beginning.fresh
    assert not set(model.beginning.fresh) & taken(model, file)


def test_a_module_is_taken_over_whole_or_not_at_all(tmp_path: Path) -> None:
    """A bias of the old classes with weights of the new ones would be neither."""
    file = trained(tmp_path, "fcn")
    theirs = stored(file)
    model = models.create("fcn", 3, "test_resnet", pretrained=file, feats_channels=4)
    assert model.beginning is not None
    own = model.state_dict()
    # With 4 instead of 8 features its weight is another, and its bias has a number for each class.
    assert "head.decoder.classifier" in model.beginning.fresh
    bias = "head.decoder.classifier.bias"
    assert own[bias].shape == theirs[bias].shape and not torch.equal(own[bias], theirs[bias])


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    file = trained(tmp_path, "fcn", "test_efficientnet")
    with pytest.raises(ValueError, match="has another backbone, test_efficientnet: backbone"):
        models.create("fcn", 3, "test_resnet", pretrained=file)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        models.create("fcn", 3, "test_resnet", pretrained=tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    file = trained(tmp_path, "fcn")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=file.name):
        models.create("fcn", 3, "test_resnet", pretrained=file)


def test_a_training_begins_with_a_run_and_goes_on_without_it(tmp_path: Path) -> None:
    train(make_tiny_config("epochs=1"), tmp_path / "first", progress=False, report=lambda _: None)
    lines: list[str] = []
    config = make_tiny_config("epochs=1", f"model.options.pretrained={tmp_path / 'first'}")
    train(config, tmp_path / "second", progress=False, report=lines.append)
    begun = [line for line in lines if line.startswith("the model begins with")]
    weights = find_weights(tmp_path / "first")
    assert begun == [f"the model begins with {len(stored(weights))} tensors of {weights}"]
    again, _ = models.checkpoint.load_model(tmp_path / "second")
    weights.unlink()
    lines.clear()
    train(config, tmp_path / "second", resume=True, progress=False, report=lines.append)
    assert not any("begins with" in line for line in lines)
    reloaded, _ = models.checkpoint.load_model(tmp_path / "second")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
