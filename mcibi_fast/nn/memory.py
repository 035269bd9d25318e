"""The memory module M: one Gaussian per class (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcibi_fast import ops

Form = Literal["paper", "released"]
Noise = Literal["released", "fresh", "fixed"]
Init = Literal["pixel", "standard"]


class GaussianMemory(nn.Module):
    """Dataset-level distribution of every class: its mean and standard deviation.

    ``form`` sets the three choices below at once; each can also be given by itself.

    ============  ==================================  =====================================
    choice        "paper"                             "released" (published checkpoints)
    ============  ==================================  =====================================
    ``unbiased``  False: Eq. 9 divides by Z           True: divides by Z - 1
    ``noise``     "fresh": a draw per training step,  "released": one fixed float32 table,
                  a fixed one at evaluation           class k drawn with seed k
    ``init``      "pixel": one pixel per class,       "standard": mean 0, deviation 1
                  see :meth:`initialize`
    ============  ==================================  =====================================

    ``noise="fixed"`` is one Philox draw for training and evaluation alike.

    The only state-dict key is ``memory`` (K, 2): float32, or float64 after ``.double()``.
    ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` leave it as it is. To continue a run bit for
    bit, save ``noise_state`` and ``met`` too: they are buffers outside the state dict.

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        form: "released" or "paper".
        momentum: m of Eq. 6, in [0, 1]; a plain attribute that a schedule may set at any time.
        unbiased, noise, init: override the form's choice.
        seed: of the Philox noise and of the pixels that ``initialize`` picks; give every rank
            the same one.
        ignore_index: label that belongs to no class.
        align_corners: of the bilinear upsampling in Eq. 7.
    """

    memory: Tensor
    met: Tensor
    noise_state: Tensor
    fixed_noise_state: Tensor
    noise_table: Tensor | None

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        form: Form = "released",
        momentum: float = 0.1,
        unbiased: bool | None = None,
        noise: Noise | None = None,
        init: Init | None = None,
        seed: int = 0,
        ignore_index: int = 255,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("form", form, ("paper", "released"))
        paper = form == "paper"
        self.num_classes = num_classes
        self.channels = channels
        self.momentum = momentum
        self.unbiased = not paper if unbiased is None else unbiased
        self.noise = noise or ("fresh" if paper else "released")
        self.init = init or ("pixel" if paper else "standard")
        _check_choice("noise", self.noise, ("released", "fresh", "fixed"))
        _check_choice("init", self.init, ("pixel", "standard"))
        self.seed = seed
        self.ignore_index = ignore_index
        self.align_corners = align_corners

        self.register_buffer(
            "memory", torch.tensor([[0.0, 1.0]] * num_classes, dtype=torch.float32)
        )
        met = torch.full((num_classes,), self.init == "standard")
        self.register_buffer("met", met, persistent=False)
        # Training steps count from 1; step 0 is the draw that evaluation keeps.
        self.register_buffer("noise_state", torch.tensor([seed, 1]), persistent=False)
        self.register_buffer("fixed_noise_state", torch.tensor([seed, 0]), persistent=False)
        table = _released_noise(num_classes, channels) if self.noise == "released" else None
        self.register_buffer("noise_table", table, persistent=False)

    def representations(self) -> Tensor:
        """C_dl (K, Z): one representation drawn per class (Eq. 11, Algorithm 1)."""
        return ops.gaussian_table(self.memory, self.channels, noise=self._noise())

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12) from the logits of W: (B, K, h, w) -> (B, Z, h, w).

        With ``hard``, W is one-hot at the largest logit (the first one on ties).
        """
        return ops.gaussian_aggregate(
            weight_logits, self.memory, self.channels, noise=self._noise(), hard=hard
        )

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Moves the classes present in ``labels`` towards their statistics (Eqs. 6-9).

        All ranks of the default process group pool their batches: the result is what one process
        with the whole batch would compute.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        self._check_features(features)
        updated = ops.memory_update(
            self.memory,
            features,
            labels,
            momentum=self.momentum,
            unbiased=self.unbiased,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            group=_process_group(),
        )
        self.memory.copy_(updated)
        self.noise_state[1] += 1

    @torch.no_grad()
    def initialize(self, features: Tensor, labels: Tensor) -> None:
        """Sets each class not met before from one of its pixels, picked at random (section 3.2).

        Call it over the train split until ``met.all()``; a class never met stays at (0, 1).
        Across ranks, the first rank that sees a class decides; every rank must call it.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        self._check_features(features)
        sums, counts = ops.class_feature_sums(
            features,
            self._pick_pixels(labels),
            self.num_classes,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        found = counts > 0
        statistics = torch.stack([sums.mean(1), sums.std(1, correction=int(self.unbiased))], dim=1)
        statistics, found = _from_first_rank(statistics.to(self.memory.dtype), found)
        self.memory.copy_(torch.where(found[:, None], statistics, self.memory))
        self.met |= found

    def _pick_pixels(self, labels: Tensor) -> Tensor:
        """``labels`` with all ignored but one random pixel of each class not met before."""
        picked = torch.full(
            labels.shape, self.ignore_index, dtype=torch.int64, device=labels.device
        )
        generator = torch.Generator().manual_seed(self.seed + int(self.met.sum()))
        for k in self.met.logical_not().nonzero().flatten().tolist():
            positions = (labels == k).flatten().nonzero().flatten()
            if k != self.ignore_index and len(positions):
                pick = int(torch.randint(len(positions), (), generator=generator))
                picked.view(-1)[positions[pick]] = k
        return picked

    def _noise(self) -> Tensor | ops.Philox:
        if self.noise_table is not None:
            return self.noise_table
        fresh = self.noise == "fresh" and self.training
        return ops.Philox(self.noise_state if fresh else self.fixed_noise_state)

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"features: expected (B, {self.channels}, h, w), got {tuple(features.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianMemory:
        memory, table = self.memory, self.noise_table
        super()._apply(fn, recurse)
        if self.memory.dtype not in (torch.float32, torch.float64):
            self.memory = memory.to(self.memory.device)
        if table is not None and self.noise_table is not None:
            # The table's bits are float32 ones, whatever the model's dtype; restored from the
            # original also after to_empty().
            self.noise_table = table.to(self.noise_table.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "memory" in state_dict:
            self.met.fill_(True)

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, {self.channels}, momentum={self.momentum}, "
            f"unbiased={self.unbiased}, noise={self.noise!r}, init={self.init!r}"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _released_noise(num_classes: int, channels: int) -> Tensor:
    """The released code's unit table (K, Z): class k from a CPU generator seeded with k.

    Its bits are those of PyTorch's AVX2 and AVX-512 path; on other CPUs entries differ by up to
    2e-6. A prefix in Z repeats only for multiples of 16.
    """
    rows = [
        torch.randn(
            channels,
            generator=torch.Generator("cpu").manual_seed(k),
            dtype=torch.float32,
            device="cpu",
        )
        for k in range(num_classes)
    ]
    return torch.stack(rows)


def _process_group() -> dist.ProcessGroup | None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def _from_first_rank(statistics: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """For each class the statistics of the lowest rank that found it."""
    group = _process_group()
    if group is None:
        return statistics, found
    world = dist.get_world_size(group)
    all_statistics = [torch.empty_like(statistics) for _ in range(world)]
    all_found = [torch.empty_like(found, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(all_statistics, statistics, group=group)
    dist.all_gather(all_found, found.to(torch.uint8), group=group)
    founds = torch.stack(all_found)
    first = founds.argmax(dim=0)
    classes = torch.arange(len(found), device=found.device)
    return torch.stack(all_statistics)[first, classes], founds.sum(dim=0) > 0
