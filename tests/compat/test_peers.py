"""The frameworks that the paper compares with, beside the authors' package (sssegmentation 1.7.0).

`python -m tests.compat.peer_errors` prints the errors.

Random weights, gates and batch statistics, in float64: logits, all losses, all gradients, and the
batch statistics after a training step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcibi_fast import cli
from mcibi_fast.compat.convert import convert
from mcibi_fast.models import head_type
from mcibi_fast.models.checkpoint import load_model
from tests.compat import peers, zoo_models
from tests.compat.peer_cases import (
    CASES,
    HEADS,
    PARAMETERS,
    released_parameters,
    settings_of,
    stand_ins,
)


@pytest.fixture(autouse=True)
def operators_of_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not installed: the package has None instead of them."""
    stand_ins(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_package(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.check(CASES[case](peers.NARROW, monkeypatch))


@pytest.mark.parametrize("framework", HEADS)
def test_initial_weights_are_the_packages(framework: str) -> None:
    """What is zero or one at the start is so in both."""
    theirs = zoo_models.build(settings_of(framework))
    model = peers.load(zoo_models.checkpoint(theirs))
    fresh = peers.created(framework, model)
    loaded = model.head.state_dict()
    for name, value in fresh.state_dict().items():
        for constant in (0, 1):
            assert bool((value == constant).all()) == bool((loaded[name] == constant).all()), name


@pytest.mark.parametrize("framework", ["annnet", "danet", "deeplabv3", "fcn"])
def test_conversion(framework: str, generator: torch.Generator) -> None:
    """`models.create` makes the loaded model again, with the options that its file showed."""
    theirs = zoo_models.build(settings_of(framework))
    theirs = zoo_models.scramble(theirs, generator).eval()
    options = {}
    if framework == "deeplabv3":
        for i, dilation in ((1, 2), (2, 3), (3, 5)):
            conv = theirs.aspp_net.parallel_branches[i][0]
            conv.dilation = conv.padding = (dilation, dilation)
        options["dilations"] = (1, 2, 3, 5)
    loaded = peers.load(zoo_models.checkpoint(theirs), **options)
    K = peers.K
    model, spec = convert(loaded, [f"class {k}" for k in range(K)], [[k, k, k] for k in range(K)])
    assert spec.name == framework
    images = torch.randn(1, 3, 57, 75, generator=generator)
    torch.testing.assert_close(
        model(images).logits, zoo_models.logits(theirs, images), rtol=1e-3, atol=1e-4
    )


def test_the_command(tmp_path: Path, generator: torch.Generator) -> None:
    theirs = zoo_models.build(settings_of("pspnet"))
    theirs = zoo_models.scramble(theirs, generator).eval()
    torch.save(zoo_models.checkpoint(theirs), tmp_path / "released.pth")
    files = [str(tmp_path / "released.pth"), str(tmp_path / "own.safetensors")]
    assert cli.main(["convert", *files]) == 0
    model, spec = load_model(files[1])
    assert spec.name == "pspnet" and spec.options["feats_channels"] == peers.Z
    images = torch.randn(1, 3, 57, 75, generator=generator)
    with torch.no_grad():
        expected = zoo_models.logits(theirs, images)
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_named() -> None:
    theirs = zoo_models.build(settings_of("nonlocalnet"))
    checkpoint = zoo_models.checkpoint(theirs)
    state = checkpoint["model"]
    assert isinstance(state, dict)
    del state["conv_after_nl.0.weight"]
    with pytest.raises(ValueError, match=r"missing: conv_after_nl\.0\.weight$"):
        peers.load(checkpoint)
    del state["nl_block.g.0.weight"]
    with pytest.raises(ValueError, match=r"^checkpoint: key nl_block\.g\.0\.weight is missing"):
        peers.load(checkpoint)


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_of_the_decoder(case: str) -> None:
    assert released_parameters(case) == PARAMETERS[case]
    framework, form = (*case.split(), "")[:2]
    widths, classes, options = [256, 512, 1024, 2048], 21, {}
    if framework == "fcn":
        options = {"convs": 2}
    elif framework == "isnet":
        classes, options = 20, {"shortcut_channels": 48}
    elif framework == "maskformer":
        widths = [192, 384, 768, 1536]
    elif framework == "setr":
        widths, options = [1024] * 4, {"decoder": form}
    elif form == "hrnet":
        widths = [720] * 4
    coarse = 2_709 if framework == "pointrend" else 0  # its classifier of the coarse logits
    found = peers.decoder_parameters(framework, classes, widths, **options)
    assert found == PARAMETERS[case] + coarse


@pytest.mark.parametrize(
    ("framework", "classes", "widths", "count"),
    [
        ("ocrnet", 21, [256, 512, 1024, 2048], PARAMETERS["ocrnet"] + 4_730_389),
        ("ocrnet", 21, [720] * 4, PARAMETERS["ocrnet hrnet"] + 3_329_557),
        ("setr", 150, [1024] * 4, 8_926_296),
    ],
)
def test_parameters_of_the_head(
    framework: str, classes: int, widths: list[int], count: int
) -> None:
    with torch.device("meta"):
        head = head_type(framework)(classes, widths)
    assert sum(p.numel() for p in head.parameters()) == count


@pytest.mark.parametrize("case", ["deeplabv3plus", "setr naive", "semanticfpn"])
def test_loaded_models_can_be_converted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` compares the logits itself."""
    load, loaded = peers.sssegmentation.load, []
    monkeypatch.setattr(
        peers.sssegmentation, "load", lambda *a, **b: loaded.append(load(*a, **b)) or loaded[-1]
    )
    CASES[case](peers.NARROW, monkeypatch)
    names = [str(i) for i in range(peers.K)]
    _, spec = convert(loaded[0].float().eval(), names, [[i, i, i] for i in range(peers.K)])
    assert spec.name == case.split()[0]
