"""``mcibi-fast convert``: the converted model is the released one, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mcibi_fast import cli
from mcibi_fast.commands.convert import class_list
from mcibi_fast.compat import convert, sssegmentation
from mcibi_fast.data import ADE20K, CAMVID_CLASSES
from mcibi_fast.models import create, hub
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import ModelSpec

K = 11
pytestmark = pytest.mark.usefixtures("own_generator")


def released_state(name: str, backbone: str = "resnet50c", **options: object) -> dict[str, Tensor]:
    """A checkpoint's entries: the released layout, made of a model of ours with a narrow head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = {"feats_channels": 16, "transform_channels": 8}
        model = create(name, K, backbone, **widths, **options)
    generator = torch.Generator().manual_seed(0)
    model.memory.memory.normal_(generator=generator).abs_()
    for key, tensor in model.state_dict().items():
        if key.endswith("bn3.weight"):  # zero in a fresh model, which hides the block's branch
            tensor.uniform_(0.2, 0.4, generator=generator)
    return {
        sssegmentation.released_name(backbones.released_name(key, model.backbone)): value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    return released_state("fcn_mcibipp")


@pytest.fixture(scope="module")
def checkpoint(released: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": released, "epoch": 130}, path)
    return path


Fails = Callable[..., str]


@pytest.fixture
def fails(fails: Fails) -> Fails:
    """The same for conversions."""
    return partial(fails, "convert")


@pytest.mark.slow
def test_equal_logits_and_prediction(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], generator: torch.Generator
) -> None:
    out = tmp_path / "model.safetensors"
    assert cli.main(["convert", str(checkpoint), str(out), "--dataset", "camvid"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: fcn_mcibipp on resnet50c, 11 classes, ")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]

    model, spec = load_model(out)
    assert spec.classes == CAMVID_CLASSES and len(spec.palette) == K
    loaded = sssegmentation.load(checkpoint)
    images = torch.randn(1, 3, 49, 75, generator=generator)
    with torch.no_grad():
        for stages in (1, 2):
            logits = model(images, stages=stages).logits
            assert torch.equal(logits, loaded(images, stages=stages).logits)
    assert logits.std() > 0

    image = tmp_path / "photo.png"
    Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3)).save(image)
    arguments = ["predict", str(out), str(image), "--out", str(tmp_path / "p"), "--cpu", "--quiet"]
    assert cli.main(arguments) == 0
    assert np.array(Image.open(tmp_path / "p" / "labels" / "photo.png")).max() < K


@pytest.mark.slow
def test_the_trainers_link(
    released: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Fails,
) -> None:
    """It is relative to where the trainer ran, so that it leads nowhere from its own folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": released}, folder / "checkpoints-epoch-9.pth")
    link = folder / "checkpoints-epoch-latest.pth"
    link.symlink_to("run/checkpoints-epoch-9.pth")
    assert not link.exists()
    for directory, path in ((tmp_path, Path("run") / link.name), (folder, Path(link.name))):
        monkeypatch.chdir(directory)
        assert torch.equal(
            sssegmentation.load(path).memory.memory, released["memory_module.memory"]
        )
    assert cli.main(["convert", str(link), str(tmp_path / "model.safetensors")]) == 0
    link.unlink()
    link.symlink_to("run/checkpoints-epoch-10.pth")
    assert "there is no file" in fails(link, tmp_path / "other.safetensors")


@pytest.mark.slow
def test_averaged_weights(
    released: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: Fails
) -> None:
    averaged = {key: value + 0.5 for key, value in released.items()}
    both, path = {"model": released, "model_ema": averaged}, tmp_path / "both.pth"
    torch.save(both, path)
    for ema, expected in ((True, averaged), (False, released)):
        model = sssegmentation.load(path, ema=ema)
        assert torch.equal(model.memory.memory, expected["memory_module.memory"])
    with pytest.warns(UserWarning, match=r"also has averaged weights \(model_ema\)"):
        sssegmentation.load(both)
    out = tmp_path / "model.safetensors"
    assert cli.main(["convert", str(path), str(out), "--ema"]) == 0
    assert "model_ema" not in capfd.readouterr().out
    assert torch.equal(load_model(out)[0].memory.memory, averaged["memory_module.memory"])
    assert cli.main(["convert", str(path), str(out)]) == 0
    assert "it also has averaged weights (model_ema)" in capfd.readouterr().out
    torch.save({"model": released}, path)
    assert "it has no averaged weights" in fails(path, out, "--ema")


@pytest.mark.slow
def test_class_names(checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / "model.safetensors"
    names = [f"thing {k}" for k in range(K)]
    assert cli.main(["convert", str(checkpoint), str(out), "--classes", ", ".join(names)]) == 0
    assert load_model(out)[1].classes == names
    before = out.read_bytes()
    message = fails(checkpoint, out, "--classes", "road,sky")
    assert "the checkpoint has 11 classes, --classes names 2" in message
    message = fails(checkpoint, out, "--dataset", "ade20k")
    assert "the checkpoint has 11 classes, ade20k has 150" in message
    assert "a name of its own" in fails(checkpoint, out, "--classes", "," + ",".join(names[:10]))
    assert "a name of its own" in fails(checkpoint, out, "--classes", ",".join(["a"] * K))
    assert "no dataset 'ade'" in fails(checkpoint, out, "--dataset", "ade")
    assert "not allowed with" in fails(checkpoint, out, "--dataset", "lip", "--classes", "a,b")
    assert out.read_bytes() == before


def test_classes_of_a_dataset_and_none() -> None:
    parser = cli.build_parser()
    args = parser.parse_args(["convert", "a.pth", "b.safetensors", "--dataset", "ade20k"])
    names, palette = class_list(args, 150)
    assert names == list(ADE20K.classes) and palette == ADE20K.palette.tolist()
    args = parser.parse_args(["convert", "a.pth", "b.safetensors"])
    assert class_list(args, 3)[0] == ["class_0", "class_1", "class_2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "weights_from"),
    [
        ("fcn_mcibipp", {"auxiliary_weight": 0.0, "downsample": True}, "auto"),
        ("pspnet_mcibipp", {"kernel_sizes": (3, 3, 1)}, "pr"),
        ("deeplabv3_mcibipp", {"extra_attention": True}, "auto"),
        ("upernet_mcibipp", {"context": "aspp"}, "cwi"),
        ("upernet_mcibipp", {"memory_joins": "after"}, "auto"),
    ],
)
def test_frameworks(
    name: str, options: dict[str, object], weights_from: str, generator: torch.Generator
) -> None:
    state = {"model": released_state(name, **options)}
    loaded = sssegmentation.load(state, weights_from=weights_from)
    model, spec = convert.convert(loaded, ["x"] * K, [[0, 0, 0]] * K)
    assert (spec.name, spec.backbone) == (name, "resnet50c")
    assert ModelSpec(**json.loads(json.dumps(asdict(spec)))).options == spec.options
    assert spec.options["weights_from"] in (weights_from, "pr" if "fcn" in name else "cwi")
    assert model.head.weights_from == loaded.head.weights_from
    images = torch.randn(1, 3, 33, 40, generator=generator)
    with torch.no_grad():
        assert torch.equal(model(images, stages=2).logits, loaded(images, stages=2).logits)


def test_bad_files(checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / "model.safetensors"
    assert "nowhere.pth" in fails(tmp_path / "nowhere.pth", out)
    text = tmp_path / "text.pth"
    text.write_text("hello")
    assert f"torch cannot load {text}" in fails(text, out)
    torch.save({"weights": {}}, text)
    assert 'expected {"model": state_dict}' in fails(text, out)
    torch.save({"model": {"a": torch.zeros(1)}}, text)
    assert "not an MCIBI++ checkpoint" in fails(text, out)
    assert "a .safetensors file, not" in fails(checkpoint, checkpoint)
    assert "there is no folder" in fails(checkpoint, tmp_path / "nowhere" / out.name)
    assert not out.exists()


@pytest.mark.parametrize("name", ["mcibipp_fcn.npz", "mcibipp_aspp.npz"])
def test_recorded_checkpoints(
    name: str, golden: Callable[[str], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Small models of the released code, whose backbones have no name in timm."""
    recorded = golden(name).items()
    state = {k[3:]: torch.as_tensor(v) for k, v in recorded if k.startswith("sd/")}
    torch.save({"model": state}, tmp_path / "small.pth")
    out = tmp_path / "model.safetensors"
    assert cli.main(["convert", str(tmp_path / "small.pth"), str(out)]) == 0
    model, spec = load_model(out)
    assert spec.backbone.startswith('released_resnet {"bottleneck": ')
    assert model.head.memory.memory.shape[0] == len(spec.classes)


def stage(branches: int, kind: str, channels: list[int]) -> dict[str, object]:
    """Sizes of a stage of HRNet with one block per branch."""
    return {
        "num_modules": 1,
        "num_branches": branches,
        "block_type": kind,
        "num_blocks": [1] * branches,
        "num_channels": channels,
        "fuse_method": "SUM",
    }


BACKBONES: dict[str, tuple[int, dict[str, object]]] = {
    "resnet": (
        16,
        {"bottleneck": False, "stem_width": 4, "depths": [1] * 4, "channels": [4, 8, 8, 8]},
    ),
    "resnest": (8, {"radix": 2, "stem_width": 4, "depths": [1] * 4, "channels": [8, 8, 16, 16]}),
    "hrnet": (
        4,
        {
            "stem_width": 8,
            "stage1": stage(1, "BOTTLENECK", [8]),
            "stage2": stage(2, "BASIC", [4, 8]),
            "stage3": stage(3, "BASIC", [4, 8, 16]),
            "stage4": stage(4, "BASIC", [4, 8, 16, 32]),
            "stem_relu": True,  # assumed for all but 19 classes
        },
    ),
    "swin": (
        32,
        {
            "width": 8,
            "depths": [1, 2, 1, 1],
            "heads": [1, 1, 2, 2],
            "window_size": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_backbones(kind: str, tmp_path: Path, generator: torch.Generator) -> None:
    """Convert, load, save_pretrained and from_pretrained: the released model's logits."""
    stride, sizes = BACKBONES[kind]
    backbone = f"released_{kind} {json.dumps(sizes)}"
    state = released_state("upernet_mcibipp", backbone, output_stride=stride)
    torch.save({"model": state}, tmp_path / "released.pth")
    loaded = sssegmentation.load(tmp_path / "released.pth", output_stride=stride)
    model, spec = convert.convert(loaded, ["x"] * K, [[0, 0, 0]] * K)
    assert (spec.backbone, spec.options["output_stride"]) == (backbone, stride)
    hub.save_pretrained(model, spec, tmp_path / "hub")
    again, same = hub.from_pretrained(tmp_path / "hub")
    assert same == spec
    images = torch.randn(1, 3, 65, 97, generator=generator)
    with torch.no_grad():
        expected = loaded(images).logits
        assert expected.std() > 0 and torch.equal(again(images).logits, expected)


def test_names_of_backbones() -> None:
    name = f"released_swin {json.dumps(BACKBONES['swin'][1])}"
    with pytest.raises(ValueError, match="released_swin can only have output_stride=32"):
        create("fcn_mcibipp", K, name, output_stride=8)
    for wrong in ("released_swin", "released_net {}", name.replace("width", "size"), name[:-1]):
        with pytest.raises(ValueError, match="is not the name of a released backbone"):
            create("fcn_mcibipp", K, wrong, output_stride=32)
    with pytest.raises(RuntimeError, match="weights are in its checkpoint"):
        create("fcn_mcibipp", K, name, output_stride=32, pretrained=True)


# How some were tested; the others took whole images at a single scale.
_SERVER = {
    "scales": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
    "flip": True,
    "window": [1024, 512],
    "stride": [341, 341],
    "softmax": "stride",
}
TESTED: dict[str, dict[str, object]] = {
    "mcibiplusplus_aspp_hrnetv2w48_cityscapes": _SERVER,
    "mcibiplusplus_aspp_resnet101os8_cityscapes": _SERVER,
    "mcibiplusplus_upernet_resnet50os8_vspw": {
        "window": [512, 512],
        "stride": [341, 341],
        "softmax": "stride",
    },
    "mcibiplusplus_upernet_swinlarge_ade20k": {
        "window": [640, 640],
        "stride": [426, 426],
        "softmax": "stride",
    },
}


@pytest.mark.slow
def test_published_shapes(
    monkeypatch: pytest.MonkeyPatch, published_shapes: dict[str, dict[str, list[int]]]
) -> None:
    """All published configurations; without values, so that no logits can be compared."""
    monkeypatch.setattr(convert, "_same_logits", lambda *_: True)
    backbones_found = []
    for name, shapes in published_shapes.items():
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in shapes.items()}
            loaded = sssegmentation.load({"model": state})
            count = loaded.memory.num_classes
            _, spec = convert.convert(loaded, ["x"] * count, [[0, 0, 0]] * count)
        assert spec.inference == {"protocol": "released"} | TESTED.get(name, {})
        backbones_found.append(spec.backbone.split()[0])
    assert sorted(backbones_found) == [
        "released_hrnet",
        "released_resnest",
        "released_swin",
        *["resnet101c"] * 2,
        *["resnet50c"] * 8,
    ]


@pytest.mark.slow
def test_a_stride_is_kept_and_other_logits_are_refused(released: dict[str, Tensor]) -> None:
    strided = sssegmentation.load({"model": released}, output_stride=16)
    spec = convert.convert(strided, ["x"] * K, [[0, 0, 0]] * K)[1]
    assert spec.options["output_stride"] == 16
    dilated = sssegmentation.load({"model": released})
    convolution = dilated.backbone.body["layer4"][1].conv2
    convolution.dilation = convolution.padding = (3, 3)  # instead of 4
    with pytest.raises(NotImplementedError, match="other logits"):
        convert.convert(dilated, ["x"] * K, [[0, 0, 0]] * K)


@pytest.mark.slow
def test_weights_that_are_not_finite(
    released: dict[str, Tensor], tmp_path: Path, fails: Fails
) -> None:
    state = dict(released)
    state["decoder_cls.conv2.bias"] = torch.full((K,), float("nan"))
    torch.save({"model": state}, tmp_path / "broken.pth")
    message = fails(tmp_path / "broken.pth", tmp_path / "model.safetensors")
    assert "head.decoder.classifier.bias holds values that are not finite" in message
