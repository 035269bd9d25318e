"""Optical flow: both functions on a picture that is shifted, and what they refuse."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from mcibi_fast.metrics import DISFlow, RAFTFlow, default_flow, flow


def shifted(generator: torch.Generator, size: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth noise, and the same 3 pixels further right and 2 further up."""
    noise = torch.rand(1, 3, size // 8 + 4, size // 8 + 4, generator=generator)
    large = F.interpolate(noise, scale_factor=8, mode="bicubic").clamp(0, 1)[0] * 255
    first = large[:, 10 : 10 + size, 10 : 10 + size]
    second = large[:, 12 : 12 + size, 7 : 7 + size]
    return first.to(torch.uint8), second.to(torch.uint8)


def test_dis_finds_a_shift(generator: torch.Generator) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    first, second = shifted(generator)
    search = DISFlow()
    flow = search(first, second)
    assert flow.shape == (2, 96, 96) and flow.dtype == torch.float32
    inside = flow[:, 16:-16, 16:-16].flatten(1).median(1).values
    torch.testing.assert_close(inside, torch.tensor([3.0, -2.0]), atol=0.2, rtol=0)
    assert search.name.startswith("DIS (OpenCV ")


def test_raft_pads_runs_and_crops(tmp_path, generator: torch.Generator) -> None:
    """With random weights from a file: shapes and padding; a flow that means anything needs the
    published weights."""
    models = pytest.importorskip("torchvision.models.optical_flow")
    with torch.random.fork_rng(devices=[]):
        state = models.raft_large(weights=None).state_dict()
    file = tmp_path / "raft.pth"
    torch.save(state, file)
    raft = RAFTFlow(file, iterations=2)
    assert raft.name == "RAFT (torchvision raft_large, raft.pth, 2 iterations)"
    first, second = shifted(generator, size=130)
    seen = []
    raft.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        flow = raft(first, second)
    assert flow.shape == (2, 130, 130)
    assert seen[0].shape == (1, 3, 136, 136)
    torch.testing.assert_close(seen[0][0, :, 3:133, 3:133], first / 127.5 - 1)
    assert torch.equal(seen[0][0, :, 0, 3:133], seen[0][0, :, 3, 3:133]), "the rim is repeated"
    assert seen[0].min() >= -1 and seen[0].max() <= 1
    with pytest.raises(ValueError, match=r"first: 96x96 is too small for RAFT"):
        raft(*shifted(generator))
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not the weights of raft_large"):
        RAFTFlow(file)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not the weights of raft_large"):
        RAFTFlow(file)


def test_without_weights_the_default_is_dis_and_says_so(monkeypatch) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    models = pytest.importorskip("torchvision.models.optical_flow")

    def offline(weights: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(models, "raft_large", offline)
    assert default_flow().name.startswith("DIS (OpenCV")
    with pytest.raises(OSError, match=r"RAFT's weights .* cannot be loaded: no network; give"):
        RAFTFlow()


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_damaged_weights_of_torch_hub(content: bytes, tmp_path, monkeypatch) -> None:
    """What an interrupted download left is named, and the default goes on with DIS."""
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    flow = pytest.importorskip("torchvision.models.optical_flow")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / flow.Raft_Large_Weights.C_T_V1.url.rsplit("/")[-1]
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert default_flow().name.startswith("DIS")
    with pytest.raises(OSError, match=rf"RAFT's weights.*downloads in {file.parent}"):
        RAFTFlow()


def test_small_frames_are_left_to_dis(monkeypatch) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    monkeypatch.setattr(flow, "RAFTFlow", lambda device: "RAFT")
    assert default_flow(size=(121, 300)) == "RAFT"
    assert default_flow(size=(300, 120)).name.startswith("DIS")


def test_without_opencv(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        ValueError, match=r'opencv-python-headless: pip install "mcibi-fast\[video\]"'
    ):
        DISFlow()


def test_wrong_frames(generator: torch.Generator) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    first, second = shifted(generator)
    with pytest.raises(ValueError, match=r"first: expected \(3, H, W\) uint8"):
        DISFlow()(first.float(), second)
    with pytest.raises(ValueError, match=r"second: shape \(3, 95, 96\) differs"):
        DISFlow()(first, second[:, 1:])
