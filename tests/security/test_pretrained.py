"""``pretrained=FILE``: whatever release of timm, nothing in the file is executed."""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from mcibi_fast.models.backbones import create_backbone
from tests.security.pickles import Call, spread

NAME = "test_resnet"


@pytest.fixture(autouse=True)
def every_file_is_read_as_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in releases of timm that unpickle: whoever asks for that gets it."""
    load = torch.load

    def checked(*arguments: Any, **options: Any) -> Any:
        assert options.get("weights_only") is True
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", checked)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(NAME).state_dict()


def loads(file: Path, state: dict[str, torch.Tensor], name: str = NAME, stride: int = 8) -> bool:
    own = create_backbone(name, output_stride=stride, pretrained=file).body.state_dict()
    same = [key for key in own if key in state and torch.equal(own[key], state[key])]
    return len(same) > len(own) // 2


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("within", [None, "state_dict", "model", "model_ema", "state_dict_ema"])
def test_what_timm_and_others_save(
    within: str | None, zipped: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content: Any = state
    if within:
        content = {
            "epoch": 3,
            "arch": NAME,
            "args": argparse.Namespace(model=NAME),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
            within: {f"module.{key}": value for key, value in state.items()},
        }
    file = tmp_path / "weights.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert loads(file, state)


def test_the_averaged_weights_come_first(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state}, tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth", state)


def test_safetensors_and_shared_entries(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    assert loads(tmp_path / "weights.safetensors", state)
    torch.save(state | {"again": state["fc.weight"].T}, tmp_path / "weights.bin")
    assert loads(tmp_path / "weights.bin", state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("within", [None, "state_dict"])
def test_code_is_not_run(
    within: str | None, zipped: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    marker = tmp_path / "owned"
    content: Any = state | {"x": Call(os.system, f"touch {marker}")}
    file = tmp_path / "weights.pth"
    torch.save(
        {within: content} if within else content, file, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        RuntimeError, match=r"weights\.pth for test_resnet \(it holds 'posix system'"
    ):
        create_backbone(NAME, pretrained=file)
    assert not marker.exists()


def test_a_tensor_without_its_values(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state | {"x": spread(10**10)}, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="with 1 values"):
        create_backbone(NAME, pretrained=tmp_path / "weights.pth")


def vit_arrays(model: Any) -> dict[str, np.ndarray]:
    """A ViT's weights under the names of the original JAX code, from random numbers."""
    rng = np.random.default_rng(0)
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    hidden, depth = model.blocks[0].mlp.fc1.out_features, len(model.blocks)
    patch = model.patch_embed.patch_size[0]
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, model.pos_embed.shape[1], width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/{part}": (width,) for part in ("scale", "bias")}
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (width, heads, width // heads)
            shapes[f"{attention}/{part}/bias"] = (heads, width // heads)
        shapes[f"{attention}/out/kernel"] = (heads, width // heads, width)
        shapes[f"{attention}/out/bias"] = (width,)
        for j, (a, b) in enumerate(((width, hidden), (hidden, width))):
            shapes[f"{block}/MlpBlock_3/Dense_{j}/kernel"] = (a, b)
            shapes[f"{block}/MlpBlock_3/Dense_{j}/bias"] = (b,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with torch.random.fork_rng(devices=[]):
        return vit_arrays(timm.create_model("vit_tiny_patch16_224"))


def test_arrays_of_the_original_transformers(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **arrays)
    file = tmp_path / "vit.npz"
    body: Any = create_backbone("vit_tiny_patch16_224", output_stride=16, pretrained=file).body
    assert np.array_equal(body.model.cls_token.detach().numpy(), arrays["cls"])
    last = arrays["Transformer/encoderblock_11/MlpBlock_3/Dense_1/kernel"].T
    assert np.array_equal(body.model.blocks[11].mlp.fc2.weight.detach().numpy(), last)


def test_arrays_that_are_pickles_or_too_many(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    code = np.array([Call(os.system, f"touch {marker}")], dtype=object)
    np.savez(tmp_path / "code.npz", **(arrays | {"cls": code}))
    with pytest.raises(RuntimeError, match=r"code\.npz for vit_tiny_patch16_224 \(Object arrays"):
        create_backbone("vit_tiny_patch16_224", output_stride=16, pretrained=tmp_path / "code.npz")
    assert not marker.exists()

    bomb = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("cls.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(200):
            member.write(bytes(2**20))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(RuntimeError, match=r"more than MAX_UNPACKING \(4\)"):
        create_backbone("vit_tiny_patch16_224", output_stride=16, pretrained=bomb)
