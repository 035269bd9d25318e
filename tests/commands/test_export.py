"""``mcibi-fast export``: from a released checkpoint to class maps in onnxruntime, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.commands.export import parse_size, read_image
from mcibi_fast.compat import sssegmentation
from mcibi_fast.data.base import normalise
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models import create
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.weights import ModelSpec, pack_weights

K = 5
SIZES = {"bottleneck": False, "stem_width": 4, "depths": [1] * 4, "channels": [4, 8, 8, 8]}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in the authors' layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create(
            "fcn_mcibipp",
            K,
            f"released_resnet {json.dumps(SIZES)}",
            feats_channels=16,
            transform_channels=8,
        ).eval()
        with torch.no_grad():
            bias = model.head.decoder.classifier.bias
            bias -= model(torch.randn(2, 3, 64, 64)).logits.mean((0, 2, 3))
    state = {
        sssegmentation.released_name(backbones.released_name(key, model.backbone)): value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(released: Path) -> Path:
    path = released.with_name("model.safetensors")
    assert cli.main(["convert", str(released), str(path), "--classes", "a,b,c,d,e"]) == 0
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.slow
def test_onnx_end_to_end(
    checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Converted, exported, run by onnxruntime as the README does: the class map of `predict`."""
    onnx = pytest.importorskip("onnx", reason="needs mcibi-fast[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs mcibi-fast[onnx]")
    out = tmp_path / "model.onnx"
    arguments = ["--size", "48,64", "--stages", "2", "--check", str(photo)]
    assert cli.main(["export", str(checkpoint), str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "ONNX, opset 18, fcn_mcibipp on released_resnet, folded" in printed
    assert f"{photo}, 1x3x48x64: logits within" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "photo.png"]

    graph = onnx.load(out).graph
    assert {node.domain for node in graph.node} == {""}
    assert not {n.op_type for n in graph.node if n.op_type.startswith(("Random", "Bitwise"))}
    # C_dl after the first convolutions of key and value, (K, 2 T).
    assert [K, 16] in [list(tensor.dims) for tensor in graph.initializer]

    session = onnxruntime.InferenceSession(str(out))
    spec = json.loads(session.get_modelmeta().custom_metadata_map["mcibi_fast.json"])
    assert spec["classes"] == ["a", "b", "c", "d", "e"] and len(spec["palette"]) == K
    pixels = np.asarray(Image.open(photo), np.float32) / 255
    images = ((pixels - spec["mean"]) / spec["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    (labels,) = session.run(["labels"], {"images": images})

    model, _ = load_model(checkpoint)
    model.head.stages = 2
    with torch.no_grad():
        expected = predict_labels(model, torch.from_numpy(images), (48, 64))
    assert len(expected.unique()) > 1
    assert (labels == expected.numpy()).mean() > 0.999


@pytest.mark.slow
def test_program_for_any_size(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], generator: torch.Generator
) -> None:
    out = tmp_path / "model.pt2"
    assert cli.main(["export", str(checkpoint), str(out), "--no-fold"]) == 0
    printed = capsys.readouterr().out
    assert "torch.export program" in printed and "not folded" in printed
    assert "random numbers, 2x3x161x131" in printed
    model, _ = load_model(checkpoint)
    images = torch.randn(3, 3, 37, 90, generator=generator)
    logits, labels = torch.export.load(out).module()(images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images).logits, rtol=1e-4, atol=1e-5)
    assert labels.shape == (3, 37, 90)


def test_bad_input(
    checkpoint: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MCIBI_FAST_DEBUG", raising=False)

    def fails(*arguments: object) -> str:
        assert cli.main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mcibi-fast: error: ") and error.count("\n") == 1
        return error

    out = tmp_path / "model.pt2"
    assert "a .onnx or a .pt2 file" in fails(checkpoint, tmp_path / "model.pth")
    assert "there is no folder" in fails(checkpoint, tmp_path / "nowhere" / "model.pt2")
    assert "expected H,W such as 512,1024" in fails(checkpoint, out, "--size", "512")
    assert "expected at least 1" in fails(checkpoint, out, "--stages", 0)
    assert "nowhere" in fails(tmp_path / "nowhere.safetensors", out)
    assert "nowhere.png" in fails(checkpoint, out, "--check", tmp_path / "nowhere.png")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert 'needs onnxscript: pip install "mcibi-fast[onnx]"' in fails(
        checkpoint, tmp_path / "model.onnx"
    )
    assert not list(tmp_path.glob("model*"))


def test_stages_without_a_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MCIBI_FAST_DEBUG", raising=False)
    spec = ModelSpec(
        "fcn", "test_resnet", {"feats_channels": 8}, ["a", "b"], [[0] * 3] * 2, [0.5] * 3, [0.5] * 3
    )
    with torch.random.fork_rng(devices=[]):
        (tmp_path / "fcn.safetensors").write_bytes(pack_weights(create_model(spec), spec))
    arguments = [str(tmp_path / name) for name in ("fcn.safetensors", "fcn.pt2")]
    assert cli.main(["export", *arguments, "--stages", "2"]) == 2
    assert "FCNHead has no memory to iterate with" in capsys.readouterr().err


def test_images_to_check_on(photo: Path, checkpoint: Path) -> None:
    _, spec = load_model(checkpoint)
    assert parse_size(None) is None and parse_size("32,48") == (32, 48)
    assert read_image(photo, spec, (32, 40)).shape == (1, 3, 32, 40)
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)
    assert torch.equal(read_image(photo, spec, None)[0], normalise(pixels, spec.mean, spec.std))
