"""What every model returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class SegmentationOutput(NamedTuple):
    """Results of a forward pass.

    Attributes:
        logits: O before the upsampling (B, K, h, w).
        losses: the weighted terms, empty without labels; the training loss is their sum.
        weight_logits: logits of W from H_pr (Eq. 10); None for a model without a memory.
        context_logits: logits of the head on the within-image context; None without such a head.
    """

    logits: Tensor
    losses: dict[str, Tensor]
    weight_logits: Tensor | None = None
    context_logits: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """The training loss, a scalar: the sum of all terms. None without labels."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else None


class DictOutput(dict[str, Any]):
    """Results of a forward pass on ``pixel_values``, as models of transformers return them.

    A dictionary of the loss (only with labels) and the logits, in this order. Its entries can also
    be read as attributes and by number.

    Attributes:
        loss: the training loss, a scalar: the sum of all terms. None without labels.
        logits: O before the upsampling (B, K, h, w).
    """

    @property
    def loss(self) -> Tensor | None:
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        return self["logits"]

    def to_tuple(self) -> tuple[Any, ...]:
        """All entries, as (loss, logits)."""
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]


# DistributedDataParallel and torch.compile look for tensors in what they know as a container.
pytree.register_pytree_node(
    DictOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: DictOutput(zip(names, values, strict=True)),
    serialized_type_name="mcibi_fast.models.output.DictOutput",
)
