"""Large images: windows that are computed band by band, and the memory that they take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mcibi_fast.defaults import LARGE_WINDOW
from mcibi_fast.inference import views
from mcibi_fast.inference.labels import predict_labels, windows_for_large
from mcibi_fast.inference.pictures import Picture
from mcibi_fast.inference.predict import predict
from mcibi_fast.recipes import InferenceConfig
from tests.inference.test_labels import PAIRS, Network, Output
from tests.inference.test_predict import SPEC, DarkOrBright

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def random_pixels(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), generator=generator).byte()


class Counted(Network):
    """Counts its calls, and the logits that are in memory at once."""

    def __init__(self) -> None:
        super().__init__()
        self.float()
        self.calls = self.most = 0
        self.alive: list[Any] = []

    def forward(self, images: Tensor) -> Output:
        import weakref

        logits = super().forward(images).logits
        self.calls += 1
        # What is kept is a copy with the classes last; the map itself dies with the call.
        original = logits.permute(0, 2, 3, 1).contiguous()
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.alive.append(weakref.ref(original))
        self.most = max(self.most, len(self.alive))
        return Output(original.permute(0, 3, 1, 2))  # contiguous again once permuted back


@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig(window=(24, 32)),
        InferenceConfig(window=(24, 32), flip=True, softmax="stride"),
        InferenceConfig((0.6, 1.0, 1.4), window=(20, 24), flip=True),
        InferenceConfig((0.5,), window=(64, 64), flip=True),
        InferenceConfig((0.7, 1.0), flip=True),
        InferenceConfig(),
    ],
    ids=str,
)
def test_a_picture_gives_what_its_normalised_image_gives(config: InferenceConfig) -> None:
    pixels, model = random_pixels(45, 71), Network().float()
    picture = Picture(pixels, MEAN, STD, torch.device("cpu"))
    with torch.no_grad():
        found = predict_labels(
            model, picture, (45, 71), config, flip_pairs=PAIRS, dtype=torch.uint8
        )
        expected = predict_labels(model, picture.whole(), (45, 71), config, flip_pairs=PAIRS)
    assert found.dtype == torch.uint8
    if config.scales == (1.0,):
        assert torch.equal(found.long(), expected)
    else:  # resized by parts, which rounds otherwise
        assert (found != expected).float().mean() < 1e-3


def test_windows_are_computed_once_and_kept_while_bands_need_them() -> None:
    model, images = Counted(), torch.randn(1, 3, 400, 60)
    config = InferenceConfig(window=(24, 32))
    with torch.no_grad():
        predict_labels(model, images, (400, 60), config)
    rows, columns = len(range(0, 400 - 24, 16)) + 1, len(range(0, 60 - 32, 21)) + 1
    assert model.calls == rows * columns > 60
    assert model.most <= 6 * columns < model.calls / 3


@pytest.mark.parametrize("flip", [False, True])
def test_blocks_of_columns_change_nothing(flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = InferenceConfig(window=(24, 32), flip=flip)
    images, model = torch.randn(2, 3, 60, 500), Counted()
    with torch.no_grad():
        expected = predict_labels(model, images, (60, 500), config)
        monkeypatch.setitem(views._KEPT, "cpu", 20_000)
        blocked = Counted()
        found = predict_labels(blocked, images, (60, 500), config)
    assert torch.equal(found, expected)
    assert model.calls < blocked.calls < 2.5 * model.calls
    assert blocked.most < model.most / 2


def test_windows_above_a_size() -> None:
    whole = InferenceConfig()
    assert windows_for_large(whole, (512, 1024)) == whole
    assert windows_for_large(whole, (512, 1025)) == InferenceConfig(window=LARGE_WINDOW)
    assert windows_for_large(whole, (1024, 1024), (512, 1024)) == whole
    scaled, own = InferenceConfig((0.5, 1.5)), InferenceConfig(window=(64, 64))
    assert windows_for_large(scaled, (500, 500)).window == LARGE_WINDOW
    assert windows_for_large(InferenceConfig((0.5,)), (1000, 1000)).window is None
    assert windows_for_large(own, (9000, 9000)) == own


def test_predict_takes_large_images_in_windows(tmp_path: Path) -> None:
    pixels = random_pixels(90, 140).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:20, :20]).save(tmp_path / "b.png")

    class Noted(DarkOrBright):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, ...]] = []

        def forward(self, images: Tensor) -> Any:
            self.seen.append(tuple(images.shape[2:]))
            return super().forward(images)

    results = {}
    for window, inference in (((32, 32), None), (None, InferenceConfig(window=(32, 32)))):
        model = Noted()
        out = tmp_path / f"out{len(results)}"
        result = predict(
            model, SPEC, tmp_path / "a.png", out, large_window=window, inference=inference
        )
        assert set(model.seen) == {(32, 32)} and len(model.seen) > 10
        assert result.in_windows == (window is not None)
        results[window] = np.array(Image.open(result.written[0]))
    assert np.array_equal(*results.values())  # as by hand
    model = Noted()
    predict(model, SPEC, tmp_path / "a.png", tmp_path / "whole", large_window=None)
    small = predict(model, SPEC, tmp_path / "b.png", tmp_path / "small", large_window=(32, 32))
    assert model.seen == [(90, 140), (20, 20)] and small.in_windows == 0


PROGRAM = """
import sys, torch
from pathlib import Path
from mcibi_fast.inference.predict import predict
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec
K = 150
options = {"feats_channels": 16, "transform_channels": 16}
colours = [[k, 2 * k % 256, 3 * k % 256] for k in range(K)]
spec = ModelSpec(
    "fcn_mcibipp", "test_resnet", options, list(map(str, range(K))), colours, [0.5] * 3, [0.25] * 3
)
torch.manual_seed(0)
torch.set_num_threads(1)
model = create_model(spec).eval()
predict(model, spec, Path(sys.argv[1]), Path(sys.argv[2]))
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", peak[0].split()[1])
"""


def peak_mebibytes(source: Path, out: Path) -> float:
    """The largest resident size of a process that predicts an image, with its interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"peak (\d+)", done.stdout)
    assert found
    return int(found[1]) / 1024


@pytest.mark.slow
def test_memory_for_a_large_image(tmp_path: Path) -> None:
    """Above what a small image takes: the image, its overlay, and what does not grow with it.

    Per pixel that is 3 bytes of the image, 1 of the labels, 3 of the overlay and 4 of Pillow's copy
    of it; the network in one pass would take 200 and more, the float64 of an overlay 60.
    """
    Image.new("RGB", (500, 500)).save(tmp_path / "small.png")
    pixels = random_pixels(150, 200).permute(1, 2, 0).numpy()
    height, width = 1500, 1600
    Image.fromarray(pixels).resize((width, height)).save(tmp_path / "large.jpg")
    small = peak_mebibytes(tmp_path / "small.png", tmp_path / "a")
    large = peak_mebibytes(tmp_path / "large.jpg", tmp_path / "b")
    assert large - small < 16 * height * width / 2**20 + 150
