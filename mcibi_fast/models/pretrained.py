"""Files of a backbone's weights, made safe for whatever release of timm reads them.

Old releases of timm unpickle files of torch.save, which may run any code. They are read here
instead (`mcibi_fast.untrusted`), and timm gets their tensors as safetensors.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mcibi_fast.untrusted import read_torch

UNPACKED = 4
"""What the arrays in an .npz file may unpack to, in units of the model's weights."""

# In the order in which timm looks for them; the averaged weights come first.
_STATES = ("state_dict_ema", "model_ema", "state_dict", "model")


@contextmanager
def readable(name: str, source: Path) -> Iterator[Path]:
    """A file with the weights in ``source`` that timm can read without running anything.

    Args:
        name: of the timm model.
        source: safetensors, a file of torch.save (a state dict, or one within what timm and others
            save of a training), or .npz of the models that timm has a reader of such files for.

    Raises:
        ValueError: it is damaged, holds more than weights, or none of the model's.
    """
    if source.suffix == ".npz":
        _check_archive(source, _timm_model(name))
        yield source
    elif source.suffix == ".safetensors":
        with safetensors.safe_open(str(source), framework="pt") as file:
            _check_entries(name, list(file.keys()))
        yield source
    else:
        state = _state_dict(read_torch(source, also=(argparse.Namespace,)))
        _check_entries(name, state.keys())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights.safetensors"
            safetensors.torch.save_file(state, file)
            del state
            yield file


def _state_dict(content: Any) -> dict[str, Tensor]:
    from timm.models import clean_state_dict

    if not isinstance(content, Mapping):
        raise ValueError("it holds no state dict")
    for key in _STATES:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    # Copies, because safetensors stores no memory twice.
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in clean_state_dict(state).items()
    }


def _check_entries(name: str, entries: Collection[str]) -> None:
    """timm skips unknown entries without a word, all of them if need be."""
    if not _timm_model(name).state_dict().keys() & set(entries):
        raise ValueError(f"none of the file's entries is one of {name}'s")


def _timm_model(name: str) -> nn.Module:
    import timm

    # Not on the meta device: timm 1.0.12 builds no transformer there.
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name)


def _check_archive(source: Path, model: nn.Module) -> None:
    """NumPy reads no pickles out of it by itself; but the arrays may unpack to any size."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with zipfile.ZipFile(source) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > UNPACKED * own:
        raise ValueError(
            f"it unpacks to {unpacked:,} bytes, more than pretrained.UNPACKED = {UNPACKED} times "
            f"the model's {own:,}"
        )
