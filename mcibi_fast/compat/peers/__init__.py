"""Released checkpoints of the methods that the paper compares with: one module for each framework.

Such a module describes the checkpoints of its framework without a memory:

- ``MARKS``: prefixes of keys. A checkpoint that has keys with all of them is one of this framework;
  if that holds of several frameworks, it is one of that with the most marks.
- ``RENAMING``: regular expressions and replacements, applied in this order, that turn a name in our
  head's state dict into that of the checkpoint. The auxiliary head and the names that the backbones
  have need no entry.
- ``FRAMEWORK``: the framework, if the module has another name because it is one of several forms.
- ``options(state)``: the head's options that shapes show, ``num_classes`` among them.
- ``OUTPUT_STRIDE``, if it is not 8: that of the published ResNets.
- ``REPEATED``, if some module has two names in the checkpoint: the prefix that is left out, and the
  one that stays.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mcibi_fast.compat import shapes
from mcibi_fast.compat.names import AUXILIARY, Rules
from mcibi_fast.models import SegmentationHead, head_type
from mcibi_fast.nn.blocks import use_leaky_relu


class Peer(Protocol):
    """A module of this package."""

    MARKS: tuple[str, ...]
    RENAMING: Rules

    @staticmethod
    def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The head's options that the checkpoint's entries show."""


PEERS: dict[str, Peer] = {
    module.name: cast(Peer, importlib.import_module(f"{__name__}.{module.name}"))
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}


def framework_of(state: Mapping[str, Tensor]) -> str | None:
    """The framework whose checkpoint this is; None if it has a memory or is of no peer."""
    if shapes.MEMORY in state:
        return None
    found = [
        name
        for name, peer in PEERS.items()
        if all(any(key.startswith(mark) for key in state) for mark in peer.MARKS)
    ]
    return max(found, key=lambda name: len(PEERS[name].MARKS), default=None)


def released_name(name: str, framework: str) -> str:
    """Translates a name in the state dict of a head or model (``head.``) to the checkpoint's name.

    Args:
        name: the name; those of a backbone are returned as they are.
        framework: one of ``PEERS``.
    """
    name = name.removeprefix("head.")
    for pattern, replacement in (*PEERS[framework].RENAMING, *AUXILIARY):
        name = re.sub(pattern, replacement, name)
    return name


def output_stride(framework: str) -> int:
    """The output stride with which a ResNet of this framework was published."""
    return getattr(PEERS[framework], "OUTPUT_STRIDE", shapes.OUTPUT_STRIDE)


def entries(framework: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's entries, without those that repeat others under a second name."""
    kept = dict(state)
    for second, first in getattr(PEERS[framework], "REPEATED", {}).items():
        for name in [name for name in kept if name.startswith(second)]:
            twin = kept.get(first + name.removeprefix(second))
            if twin is not None and (twin.is_meta or torch.equal(twin, kept[name])):
                del kept[name]
    return kept


def build_head(
    framework: str,
    state: Mapping[str, Tensor],
    in_channels: Sequence[int],
    *,
    negative_slope: float | None = None,
    **given: Any,
) -> SegmentationHead:
    """The head of a checkpoint, with fresh weights.

    Args:
        framework: one of ``PEERS``.
        state: the checkpoint's entries; only their names and shapes are read.
        in_channels: channels of the backbone's maps.
        negative_slope: if not 0, the slope of LeakyReLUs instead of the head's ReLUs.
        given: further options of the head, which count more than what shapes show.

    Raises:
        ValueError: an entry is missing.
    """
    peer = PEERS[framework]
    options = peer.options(state)
    if not shapes.auxiliary_widths(state):
        options.setdefault("auxiliary_weight", 0.0)
    options |= given
    head: SegmentationHead = head_type(getattr(peer, "FRAMEWORK", framework))(
        options.pop("num_classes"), in_channels, **options
    )
    if negative_slope:
        use_leaky_relu(head, negative_slope)
    return head
