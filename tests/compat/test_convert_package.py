"""Models of the authors' package, converted: `create` makes them again, with the same logits."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mcibi_fast import cli
from mcibi_fast.compat import convert, sssegmentation
from mcibi_fast.models.checkpoint import create_model, load_model
from tests.compat import zoo_models as zoo

# A whole one of each kind is in `tests/compat/test_zoo.py`; these are narrow.
CONVERTED = {
    "mcibiplusplus_upernet_resnet50os8_cityscapes": "upernet_mcibipp",
    "mcibiplusplus_aspp_hrnetv2w48_lip": "deeplabv3_mcibipp",
    "mcibi_deeplabv3_r50_lip": "deeplabv3_mcibi",
    "mcibi_deeplabv3_hrnetv2w48_cityscapes": "deeplabv3_mcibi",
    "mcibi_deeplabv3_vitlarge_ade20k": "deeplabv3_mcibi",
    "isnet_resnet50os8_lip": "isnet",
    "isnet_resnest101os8_ade20k": "isnet",
}
pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_converted_models(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    entry = zoo.PUBLISHED[name]
    released = zoo.scramble(zoo.released(entry), generator)
    torch.save(zoo.checkpoint(released), tmp_path / "small.pth")
    out = tmp_path / "model.safetensors"
    hidden = entry.hidden
    options = ["--dilations", ",".join(map(str, hidden.dilations))]
    options += ["--negative-slope", str(hidden.negative_slope)]
    options += ["--stem-relu" if hidden.stem_relu else "--no-stem-relu"]
    assert cli.main(["convert", str(tmp_path / "small.pth"), str(out), *options]) == 0
    model, spec = load_model(out)
    assert spec.name == CONVERTED[name] and spec.inference is None
    images = torch.randn(1, 3, 49, 161, generator=generator, dtype=torch.float64)
    expected = zoo.logits(released.double(), images)
    with torch.no_grad():
        logits = model.double()(images).logits
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    # It can be fine-tuned on other classes.
    options = spec.options | {"pretrained": str(out)}
    two = replace(spec, classes=["a", "b"], palette=[[0, 0, 0]] * 2, options=options)
    tuned = create_model(two)
    assert tuned.beginning is not None and tuned.beginning.fresh
    assert set(tuned.beginning.fresh) == set(tuned.beginning.unused)
    assert {n.rpartition(".")[2] for n in tuned.beginning.fresh} <= {"classifier", "memory"}


@pytest.mark.slow
def test_what_the_trainer_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Its optimiser, averaged weights and link, all made by the package itself."""
    from ssseg.modules import utils
    from ssseg.modules.models.optimizers.builder import BuildOptimizer
    from ssseg.modules.models.segmentors.base.ema import EMASegmentor

    model = zoo.scramble(zoo.released(zoo.PUBLISHED["isnet_resnet50os8_ade20k"]), generator)
    optimizer = BuildOptimizer(
        model, {"type": "SGD", "lr": 0.01, "momentum": 0.9, "params_rules": {}}
    )
    images = torch.randn(2, 3, 65, 65, generator=generator)
    labels = torch.randint(150, (2, 65, 65), generator=generator)
    model.train()(zoo.inputs(images, labels, "TRAIN")).loss.backward()
    averaged = EMASegmentor(model, momentum=0.5)
    optimizer.step()
    averaged.update(model)
    saved = {"cur_epoch": 1, "cur_iter": 1, "optimizer": optimizer.state_dict()}
    saved |= {"model": model.state_dict(), "model_ema": averaged.state()}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    utils.saveckpts(saved, "run/checkpoints-epoch-1.pth")

    link = tmp_path / "run" / "checkpoints-epoch-latest.pth"
    images = images.double()
    for ema, expected in ((False, model), (True, averaged.segmentor_ema)):
        loaded = sssegmentation.load(link, ema=ema, negative_slope=0).double()
        with torch.no_grad():
            logits = loaded(images).logits
        expected = zoo.logits(expected.double().eval(), images)
        assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_protocol_is_stored(generator: torch.Generator) -> None:
    entry = zoo.PUBLISHED["mcibi_deeplabv3_vitlarge_ade20k"]
    released = zoo.scramble(zoo.released(entry), generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = sssegmentation.load(zoo.checkpoint(released), **asdict(entry.hidden))
    assert loaded.tested_with is None  # a narrow model is none of the published ones
    loaded.tested_with = dict(entry.inference)
    _, spec = convert.convert(loaded, ["x"] * 150, [[0, 0, 0]] * 150)
    assert spec.inference == {
        "protocol": "released",
        "window": [512, 512],
        "stride": [341, 341],
        "softmax": "stride",
    }
