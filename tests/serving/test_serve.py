"""The service of `mcibi-fast serve`: what it answers, what it refuses, where it listens."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from mcibi_fast.inference import export
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.serving.app import create_app
from mcibi_fast.serving.labellers import open_labeller

PALETTE = [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
SPEC = ModelSpec(
    "fcn_mcibipp",
    "test_resnet",
    {"feats_channels": 8, "transform_channels": 8},
    ["red <b>", "green", "blue"],
    PALETTE,
    [0.5] * 3,
    [0.25] * 3,
)
pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        file.write_bytes(pack_weights(create_model(SPEC), SPEC))
    return file


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    """A service that runs, on a free port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(create_app(open_labeller(weights)), log_level="error")
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def picture(width: int = 48, height: int = 40, kind: str = "PNG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def post(url: str, content: bytes, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=content, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_page_and_classes(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        page = answer.read().decode()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page
    with urllib.request.urlopen(f"{address}/classes") as answer:
        classes = json.load(answer)
    assert classes[0] == {"name": "red <b>", "colour": [200, 0, 0]} and len(classes) == 3
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    for path in ("docs", "redoc", "openapi.json"):  # these would load scripts from elsewhere
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/{path}")


def expected(content: bytes, weights: Path) -> np.ndarray:
    from mcibi_fast.models.checkpoint import load_model

    model, spec = load_model(weights)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
    images = ((pixels / 255 - spec.mean[0]) / spec.std[0])[None]
    with torch.no_grad():
        return predict_labels(model.eval(), images, images.shape[2:])[0].numpy()


def test_predictions_are_those_of_the_model(address: str, weights: Path) -> None:
    content = picture()
    status, answer = post(f"{address}/predict?result=labels", content)
    labels = Image.open(io.BytesIO(answer))
    assert (
        status == 200 and labels.mode == "P" and [*labels.getpalette()[:9]] == [*np.ravel(PALETTE)]
    )
    assert np.array_equal(np.array(labels), expected(content, weights))
    status, answer = post(f"{address}/predict", content)
    overlay = np.array(Image.open(io.BytesIO(answer)), float)
    pixels = np.array(Image.open(io.BytesIO(content)), float)
    right = pixels + 0.55 * (np.array(PALETTE)[np.array(labels)] - pixels)
    assert status == 200 and np.abs(overlay - right).max() <= 1


def test_exif_turns_the_picture(address: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    status, answer = post(f"{address}/predict", picture(48, 32, "JPEG", exif=exif))
    assert status == 200 and Image.open(io.BytesIO(answer)).size == (32, 48)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"<svg/>", 400, "upload"),
        (picture()[:200], 400, "upload"),
    ],
)
def test_what_is_no_picture_is_one_line(
    address: str, content: bytes, status: int, words: str
) -> None:
    got, answer = post(f"{address}/predict", content)
    error = json.loads(answer)["error"]
    assert got == status and words in error and "\n" not in error


def test_limits(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "100")
    status, answer = post(f"{address}/predict", picture())
    assert status == 400 and "MAX_PIXELS (100)" in json.loads(answer)["error"]
    monkeypatch.setenv("MCIBI_FAST_MAX_FILE_BYTES", "1000")
    status, answer = post(f"{address}/predict", picture())
    assert status == 413 and "MAX_FILE_BYTES (1,000)" in json.loads(answer)["error"]


def test_only_this_machine_by_its_own_name(address: str) -> None:
    status, _ = post(f"{address}/predict", picture(), Host="evil.example")
    assert status == 400
    assert post(f"{address}/predict?result=else", picture())[0] == 422


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (64, 96)])
def test_onnx_file(weights: Path, tmp_path: Path, size: tuple[int, int] | None) -> None:
    """Of any size, the model's labels; of a fixed size, the picture comes in that size."""
    pytest.importorskip("onnxscript")
    from mcibi_fast.models.checkpoint import load_model

    model, spec = load_model(weights)
    export.save(model, spec, tmp_path / "model.onnx", size=size)
    labeller = open_labeller(tmp_path / "model.onnx")
    assert labeller.spec == spec
    pixels = np.array(Image.open(io.BytesIO(picture(96, 64))))
    labels = labeller(pixels)
    assert (labels != open_labeller(weights)(pixels)).mean() < 0.01
    assert labeller(pixels.repeat(2, 0).repeat(2, 1)).shape == (128, 192)


def test_wrong_files_and_ports(tmp_path: Path, weights: Path, fails: Callable[..., str]) -> None:
    pytest.importorskip("onnxruntime")
    assert "does not exist" in fails("serve", tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert "is no ONNX file" in fails("serve", tmp_path / "bad.onnx")
    assert "holds no checkpoint" in fails("serve", tmp_path)
    assert "--port" in fails("serve", weights, "--port", "70000")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in fails("serve", weights, "--port", taken.getsockname()[1])
