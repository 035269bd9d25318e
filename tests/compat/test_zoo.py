"""Every published checkpoint beside the authors' package itself (sssegmentation 1.7.0).

The package's models are built from the model zoo's settings with random weights, statistics and
memory; saved as its trainer does, and loaded by ours. The released copy of HRNet cannot be built
and lacks the switch of its stem, so that instances repaired here are compared with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat import sssegmentation
from mcibi_fast.compat.names import released_name
from mcibi_fast.compat.shapes import layout_of
from mcibi_fast.compat.zoo import Hidden, Published, identify
from mcibi_fast.models import Segmentor
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.outline import outline
from tests.compat import zoo_models as zoo
from tests.compat.zoo_errors import whole_error
from tests.compat.zoo_models import PUBLISHED
from tests.conftest import recorded_shapes

TOLERANCE = 1e-10  # relative, in float64; the largest errors are near 1e-14


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 0
    return float((value - expected).abs().max() / scale)


def pair(name: str, generator: torch.Generator, **options: object) -> tuple[nn.Module, Segmentor]:
    """A small model of the package in float64, and ours loaded from its checkpoint.

    Nothing but the dataset is said: all else is known of the published checkpoints.
    """
    entry = PUBLISHED[name]
    released = zoo.scramble(zoo.released(entry), generator).double()
    # In the layout of ours: convolutions then sum in the same order, and what is compared is the
    # models, not how a hundred layers with random weights enlarge the rounding of a sum.
    released = released.to(memory_format=torch.channels_last)
    given = {"dropout": 0.0, "ignore_index": -100} | options
    with pytest.warns(UserWarning, match=f"taken for {name} by its dataset and structure"):
        loaded = sssegmentation.load(zoo.checkpoint(released), dataset=entry.dataset, **given)
    return released, loaded.double()


def structures() -> Iterator[str]:
    """One published name for all whose small models differ in the classes alone."""
    seen = set()
    for entry in PUBLISHED.values():
        kind = "resnet" if entry.layout.backbone.startswith("resnet") else entry.layout.backbone
        structure = replace(entry.layout, backbone=kind, classes=0), entry.hidden
        if structure not in seen:
            yield entry.name
        seen.add(structure)


STRUCTURES = list(structures())


def images_for(entry: Published, generator: torch.Generator) -> Tensor:
    """Sides that no stride divides; at least one beyond the largest dilation of ASPP."""
    long = {"hrnetv2w48": 157, "vitlarge": 325, "swinlarge": 75}.get(entry.layout.backbone, 301)
    if entry.layout.context != "aspp":
        long = 75
    return torch.randn(1, 3, 49, long, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.thinned(only={"name": STRUCTURES})
def test_every_published_checkpoint(name: str, generator: torch.Generator) -> None:
    released, loaded = pair(name, generator)
    images = images_for(PUBLISHED[name], generator)
    expected = zoo.logits(released, images)
    with torch.no_grad():
        assert relative_error(loaded(images).logits, expected) <= TOLERANCE
        assert expected.std() > 1e-3


def whole(entry: Published) -> dict[str, Tensor]:
    """Names and shapes of a whole checkpoint, without values."""
    model = outline(lambda: zoo.released(entry, small=False), 10**6)
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.thinned(only={"name": [*STRUCTURES, *recorded_shapes()]})
def test_whole_layouts_are_read(name: str, published_shapes: dict[str, object]) -> None:
    entry, state = PUBLISHED[name], whole(PUBLISHED[name])
    if name in published_shapes:
        assert {k: list(v.shape) for k, v in state.items()} == published_shapes[name]
    assert layout_of(state) == entry.layout
    hrnet = entry.layout.backbone == "hrnetv2w48"
    if entry.hidden == Hidden() and not hrnet:
        return  # loading takes seconds
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is assumed if the dataset is given
        model = sssegmentation.load({"model": state}, dataset=entry.dataset)
    assert model.tested_with == entry.inference
    assert backbones.has_stem_relu(model.backbone) == (hrnet and entry.dataset != "cityscapes")
    slopes = {m.negative_slope for m in model.head.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == ({entry.hidden.negative_slope} - {0.0})
    if entry.layout.method == "mcibiplusplus":
        only = name == "mcibiplusplus_ppm_resnet50os8_ade20k"
        assert model.head.weights_from == ("pr" if only else "cwi")


@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_are_recognised(name: str) -> None:
    """By the name of file or folder, by the dataset and the shapes, and by the shapes alone."""
    entry = PUBLISHED[name]
    layout = entry.layout
    assert identify(layout) == (entry, "by its shapes")
    assert identify(replace(layout, other_widths=True)) == (None, "")
    assert identify(layout, names=("latest", name)) == (entry, "by its name")
    assert identify(layout, dataset=entry.dataset)[0] == entry
    assert identify(layout, dataset="camvid") == (None, "")


def test_mcibis_files_have_shorter_names_than_its_configurations() -> None:
    entry = PUBLISHED["mcibi_deeplabv3_r50_lip"]
    assert identify(entry.layout, names=("mcibi_deeplabv3_resnet50os8_lip",))[0] == entry
    other = replace(entry.layout, classes=21)
    assert identify(other, names=(entry.name,)) == (None, "")


# Every backbone, every method, and what no shape shows; all are in `tests/compat/zoo_errors.py`.
WHOLE = [
    "mcibiplusplus_ppm_resnet50os8_ade20k",
    "mcibiplusplus_aspp_resnest101os8_cityscapes",
    "mcibiplusplus_aspp_hrnetv2w48_cityscapes",
    "mcibiplusplus_upernet_resnet50os8_cityscapes",
    "mcibiplusplus_upernet_swinlarge_ade20k",
    "mcibi_deeplabv3_r50_lip",
    "mcibi_deeplabv3_vitlarge_ade20k",
    "isnet_resnet101os8_lip",
]


# The layouts of the others are read whole above, and their structures compared in small.
WHOLE_BY_DEFAULT = [
    "mcibiplusplus_aspp_hrnetv2w48_cityscapes",
    "mcibiplusplus_upernet_swinlarge_ade20k",
    "mcibi_deeplabv3_r50_lip",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.thinned(only={"name": WHOLE_BY_DEFAULT})
def test_whole_models(name: str, generator: torch.Generator) -> None:
    """Loaded with nothing but the dataset's name: all else is known of a published checkpoint."""
    assert whole_error(PUBLISHED[name], generator) <= TOLERANCE


@pytest.mark.slow
def test_a_file_and_its_folder_have_the_checkpoints_name(
    tmp_path: Path, generator: torch.Generator
) -> None:
    """PPM R50 for ADE20K is the one that gathers with the logits of H_pr."""
    name = "mcibiplusplus_ppm_resnet50os8_ade20k"
    released = zoo.released(PUBLISHED[name], small=False)
    file = tmp_path / f"{name}.pth"
    torch.save(zoo.checkpoint(released), file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sssegmentation.load(file)
    assert model.head.weights_from == "pr" and model.tested_with == {"protocol": "released"}
    (tmp_path / name).mkdir()
    file = file.rename(tmp_path / name / "checkpoints-epoch-130.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sssegmentation.load(file).head.weights_from == "pr"
        assert sssegmentation.load(file, weights_from="cwi").head.weights_from == "cwi"
    file = file.rename(tmp_path / "mine.pth")
    with pytest.warns(
        UserWarning, match=rf"taken for {name} by its shapes, hence weights_from='pr'"
    ):
        assert sssegmentation.load(file).head.weights_from == "pr"


# ---- training ----------------------------------------------------------------------------------

TRAINED = [
    "mcibiplusplus_resnet50os8_ade20k",
    "mcibiplusplus_ppm_resnet50os8_ade20k",
    "mcibiplusplus_aspp_hrnetv2w48_lip",
    "mcibiplusplus_upernet_resnet50os8_cityscapes",
    "mcibiplusplus_upernet_swinlarge_ade20k",
    "mcibi_deeplabv3_r50_ade20k",
    "mcibi_deeplabv3_r101_lip",
    "mcibi_deeplabv3_hrnetv2w48_cityscapes",
    "mcibi_deeplabv3_vitlarge_cocostuff10k",
    "isnet_resnet50os8_lip",
    "isnet_resnest101os8_cocostuff10k",
]
RENAMED = {"loss_cls_stage1": "loss_pr", "loss_cls_stage2": "loss_cls"}  # of MCIBI and ISNet


@pytest.mark.parametrize("name", TRAINED)
def test_two_training_steps(name: str, generator: torch.Generator) -> None:
    """Losses, all gradients, batch statistics and the memory, in the second epoch."""
    entry = PUBLISHED[name]
    method, options = entry.layout.method, {}
    if method == "mcibi":
        options["memory_loss_weight"] = 1.0 if entry.dataset == "ade20k" else 0.0
    released, loaded = pair(name, generator, **options)
    if method == "mcibi":
        read_a_copy(released.memory_module)
    released.train()
    loaded.train()
    if method != "isnet":
        loaded.schedule(epoch=1, lr_factor=0.4)
    forward = {} if method == "isnet" else {"learning_rate": 0.004, "epoch": 2}
    for _ in range(2):
        images = torch.randn(2, 3, 65, 81, generator=generator, dtype=torch.float64)
        labels = torch.randint(entry.layout.classes, (2, 9, 9), generator=generator)
        labels = labels.repeat_interleave(8, 1).repeat_interleave(9, 2)[:, :65].contiguous()
        labels[0, :5] = -100
        for model in (released, loaded):
            model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            out = released(zoo.inputs(images, labels, "TRAIN"), **forward)
        out.loss.backward()
        losses = loaded(images, labels).losses
        sum(losses.values()).backward()

        recorded = dict(out.losses_log_dict)
        assert recorded.pop("loss_total") == pytest.approx(float(out.loss), rel=1e-10)
        recorded = {RENAMED.get(name, name): value for name, value in recorded.items()}
        assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(
            recorded, rel=1e-10
        )
        check_gradients(entry, released, loaded)
    if method != "isnet":
        memory = released.memory_module.memory
        assert relative_error(loaded.memory.memory, memory) <= TOLERANCE
    state = loaded.state_dict()
    for name, value in renamed(entry, loaded, dict(released.state_dict())).items():
        if "running" in name:
            assert relative_error(state[name], value) <= TOLERANCE, name


def read_a_copy(module: nn.Module) -> None:
    """Lets MCIBI's memory be read as a copy.

    The package updates the memory in place between the forward and the backward pass, which still
    needs the old values: its gradients mix both. Ours are those of the forward pass.
    """
    forward = module.forward

    def reading(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        memory = module.memory
        module.memory = nn.Parameter(memory.data.clone(), requires_grad=False)
        _, output = forward(*inputs)
        module.memory = memory
        return memory.data, output

    module.forward = reading


def renamed(entry: Published, loaded: Segmentor, released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of the package's model under our names."""
    names = {
        released_name(
            backbones.released_name(name, loaded.backbone),
            entry.layout.method,
            shortcut=entry.layout.shortcut,
        ): name
        for name in loaded.state_dict()
    }
    return {names[name]: value for name, value in released.items()}


def check_gradients(entry: Published, released: nn.Module, loaded: Segmentor) -> None:
    gradients = {name: p.grad for name, p in released.named_parameters() if p.grad is not None}
    gradients = renamed(entry, loaded, gradients)
    own = {name: p.grad for name, p in loaded.named_parameters()}
    assert own.keys() == gradients.keys()
    largest = max(g.abs().max() for g in gradients.values())
    for name, expected in gradients.items():
        assert (own[name] - expected).abs().max() <= TOLERANCE * largest, name


@pytest.mark.parametrize("name", ["mcibi_deeplabv3_r50_lip", "isnet_resnet50os8_lip"])
def test_heads_alone(name: str, generator: torch.Generator) -> None:
    released, _ = pair(name, generator)
    images = torch.randn(1, 3, 49, 75, generator=generator, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"not a published checkpoint .*negative_slope=0.0"):
        sssegmentation.head(released.state_dict())
    head = sssegmentation.head(released.state_dict(), negative_slope=0.01).double()
    with torch.no_grad():
        logits = head(released.backbone_net(images)).logits
    assert relative_error(logits, zoo.logits(released, images)) <= TOLERANCE


def test_what_is_assumed_is_said(generator: torch.Generator) -> None:
    small = zoo.released(PUBLISHED["mcibiplusplus_aspp_hrnetv2w48_lip"])
    checkpoint = zoo.checkpoint(small)
    everything = (
        r"weights_from='cwi', dilations=\(1, 12, 24, 36\), negative_slope=0.0, stem_relu=True"
    )
    with pytest.warns(UserWarning, match=everything):
        model = sssegmentation.load(checkpoint)
    assert backbones.has_stem_relu(model.backbone) and model.tested_with is None
    with pytest.warns(UserWarning, match=r"this is assumed: stem_relu=False;") as said:
        model = sssegmentation.load(
            checkpoint,
            dataset="cityscapes",
            weights_from="cwi",
            dilations=(1, 12, 24, 36),
            negative_slope=0,
        )
    assert len(said) == 1 and not backbones.has_stem_relu(model.backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sssegmentation.load(
            checkpoint,
            weights_from="cwi",
            dilations=(1, 12, 24, 36),
            negative_slope=0,
            stem_relu=True,
        )
