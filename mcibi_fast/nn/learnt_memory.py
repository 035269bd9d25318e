"""A memory whose class representations are learnt by gradient: a control for the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.nn.class_memory import ClassMemory


class LearntMemory(ClassMemory):
    """One learnt vector per class, as in an embedding, instead of statistics of the dataset.

    It answers whether what a network gains from a memory comes from what the memory has seen. The
    only state-dict key is ``memory`` (K, Z), a parameter; it begins with draws from N(0, 1).

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        fixed: never learn: the vectors stay random.
        seed: seed of the first values; give every rank the same one.
    """

    memory: nn.Parameter

    def __init__(
        self, num_classes: int, channels: int, *, fixed: bool = False, seed: int = 0
    ) -> None:
        super().__init__(
            num_classes,
            channels,
            momentum=0.0,
            momentum_schedule="fixed",
            fixed=fixed,
            init="standard",
            seed=seed,
            ignore_index=IGNORE_INDEX,
            align_corners=False,
        )
        self.memory = nn.Parameter(torch.empty(num_classes, channels), requires_grad=not fixed)
        self.reset_parameters()

    @property
    def met(self) -> Tensor:
        """(K,): True, as every class has a vector from the start."""
        return self.memory.new_ones(self.num_classes, dtype=torch.bool)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the first values again."""
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.num_classes, self.channels, generator=generator, device="cpu")
        self.memory.copy_(values)

    def representations(self) -> Tensor:
        """C_dl (K, Z)."""
        return self.memory

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12) from the logits of W: (B, K, h, w) -> (B, Z, h, w).

        It is not fused, as the fused op has no gradient for the representations.
        """
        if hard:
            return self.memory[weight_logits.argmax(1)].permute(0, 3, 1, 2)
        weights = weight_logits.softmax(1).to(self.memory.dtype)
        mixed = torch.einsum("bkhw,kz->bzhw", weights, self.memory)
        return mixed.to(weight_logits.dtype)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Nothing: the optimiser changes the vectors."""
        self._check_features(features)

    def observe(self, features: Tensor, labels: Tensor, *outputs: Tensor) -> list[Tensor]:
        """Returns the outputs: the optimiser changes the vectors."""
        return list(outputs)

    def _nothing(self) -> list[Tensor]:
        return []

    def initialize(self, features: Tensor, labels: Tensor) -> None:
        """Nothing: every class has a vector."""

    def initialize_from(self, centres: Tensor) -> None:
        """Nothing: every class has a vector."""

    def extra_repr(self) -> str:
        return f"{self.num_classes}, {self.channels}, fixed={self.fixed}"
