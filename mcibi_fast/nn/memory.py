"""The memory module M: one Gaussian per class (section 3.2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.nn.class_memory import (
    ClassMemory,
    Init,
    MomentumSchedule,
    _check_choice,
    _from_first_rank,
    _of_rank_zero,
    _process_group,
)
from mcibi_fast.ops.finite import finite_rows
from mcibi_fast.ops.recompute import once, remembered

Form = Literal["paper", "released"]
Noise = Literal["released", "fresh", "fixed"]
_UNSET = [0.0, 1.0]  # mean and deviation of a class that was never set


class GaussianMemory(ClassMemory):
    """The distribution of every class over the dataset: its mean and standard deviation.

    ``form`` sets the three choices below at once; each can also be given separately.

    ============  ==================================  =====================================
    choice        "paper"                             "released" (published checkpoints)
    ============  ==================================  =====================================
    ``unbiased``  False: Eq. 9 divides by Z           True: divides by Z - 1
    ``noise``     "fresh": a draw per training step,  "released": one fixed float32 table,
                  a fixed one at evaluation           class k drawn with seed k
    ``init``      "pixel": one pixel per class,       "standard": mean 0, deviation 1
                  see :meth:`initialize`
    ============  ==================================  =====================================

    ``init="cluster"`` takes the statistics of a cluster's centre, see :meth:`initialize_from`.
    ``noise="fixed"`` is a single Philox draw that training and evaluation share.

    The only state-dict key is ``memory`` (K, 2): float32, or float64 after ``.double()``.
    ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` do not change its dtype. To continue a run bit
    for bit, save ``noise_state`` and ``met`` too: tensors outside the state dict that hold their
    values however a model is built and loaded (:mod:`mcibi_fast.nn.transient`).

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        form: "released" or "paper".
        momentum: m of Eq. 6, in [0, 1]; a plain attribute that may be set at any time.
        momentum_schedule: "poly" scales the momentum with the learning rate (Table 4), provided
            that ``schedule`` is called before every step; "fixed" keeps it.
        fixed: never change a class after its initialisation.
        unbiased, noise, init: override the form's choice.
        seed: seed of the Philox noise and of the pixels that ``initialize`` picks; give every rank
            the same one.
        ignore_index: label that belongs to no class.
        align_corners: whether the bilinear upsampling in Eq. 7 aligns corners.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        form: Form = "released",
        momentum: float = MOMENTUM,
        momentum_schedule: MomentumSchedule = "fixed",
        fixed: bool = False,
        unbiased: bool | None = None,
        noise: Noise | None = None,
        init: Init | None = None,
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> None:
        _check_choice("form", form, ("paper", "released"))
        paper = form == "paper"
        super().__init__(
            num_classes,
            channels,
            momentum=momentum,
            momentum_schedule=momentum_schedule,
            fixed=fixed,
            init=init or ("pixel" if paper else "standard"),
            seed=seed,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        self.unbiased = not paper if unbiased is None else unbiased
        self.noise = noise or ("fresh" if paper else "released")
        _check_choice("noise", self.noise, ("released", "fresh", "fixed"))

        self.register_buffer("memory", torch.tensor([_UNSET] * num_classes, dtype=torch.float32))
        self._hold("met", self._initially_met())
        self._hold("noise_state", self._first_noise_state())
        self._hold("fixed_noise_state", torch.tensor([seed, 0], device="cpu"))
        table = _released_noise(num_classes, channels) if self.noise == "released" else None
        self._hold("noise_table", table)

    def _initially_met(self) -> Tensor:
        return torch.tensor([self.init == "standard"] * self.num_classes, device="cpu")

    def _first_noise_state(self) -> Tensor:
        # Training steps count from 1; step 0 is the draw that evaluation uses.
        return torch.tensor([self.seed, 1], device="cpu")

    @property
    def met(self) -> Tensor:
        """(K,): which classes have been set; the tensor itself, which may be changed in place."""
        met = self._held("met", self.memory.device)
        if not met.is_meta:  # some loaders write the memory behind the module's back
            mean, deviation = self.memory.detach().unbind(1)
            met |= (mean != _UNSET[0]) | (deviation != _UNSET[1])  # not a copy, which would wait
        return met

    @property
    def noise_state(self) -> Tensor:
        """Philox (seed, step) of the next training step, int64; it may be changed in place."""
        return self._held("noise_state", self.memory.device)

    @property
    def fixed_noise_state(self) -> Tensor:
        """Philox (seed, 0), of the draw that evaluation uses."""
        return self._held("fixed_noise_state", self.memory.device)

    @property
    def noise_table(self) -> Tensor | None:
        """The fixed noise (K, Z) in float32 for ``noise="released"``; otherwise None."""
        return self._held("noise_table", self.memory.device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets everything, as after ``__init__``; also for a memory without values yet."""
        self.memory[:, 0], self.memory[:, 1] = _UNSET
        self._hold("met", self._initially_met())
        self._hold("noise_state", self._first_noise_state())

    def representations(self) -> Tensor:
        """C_dl (K, Z): one representation drawn per class (Eq. 11, Algorithm 1)."""
        return ops.gaussian_table(self._read(), self.channels, noise=self._noise())

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12) from the logits of W: (B, K, h, w) -> (B, Z, h, w).

        With ``hard``, W is one-hot at the largest logit (the first one on ties).
        """
        return ops.gaussian_aggregate(
            weight_logits, self._read(), self.channels, noise=self._noise(), hard=hard
        )

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Moves the classes present in ``labels`` towards their statistics (Eqs. 6-9).

        All ranks of the default process group pool their batches: the result is what one process
        with the whole batch would compute. A class whose statistics are not finite, as after an
        overflow in float16, keeps its row and is counted, see :func:`mcibi_fast.ops.kept_rows`.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        self._check_features(features)
        if not self.fixed:
            self.memory.copy_(once(self._updated(features, labels), self.memory))
        state = self.noise_state
        state.copy_(once(torch.stack([state[0], state[1] + 1]), state))

    @torch.no_grad()
    def initialize(self, features: Tensor, labels: Tensor) -> None:
        """Sets each class that is not set yet from one random pixel of it (section 3.2).

        Call it on batches of the train split until ``met.all()``; a class that never occurs stays
        at (0, 1). Across ranks, the first rank that sees a class decides; every rank must call it.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        self._check_features(features)
        sums, counts = ops.class_feature_sums(
            features,
            self._pick_pixels(labels, self.seed + int(self.met.sum())),
            self.num_classes,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        statistics = self._statistics(sums)
        found = finite_rows(statistics, counts > 0)  # else a pixel of a later batch is taken
        statistics, found = _from_first_rank(statistics, found)
        self.memory.copy_(torch.where(found[:, None], statistics, self.memory))
        self.met.logical_or_(found)

    @torch.no_grad()
    def initialize_from(self, centres: Tensor) -> None:
        """Sets each class that is not set yet from its cluster's centre (section 4.2).

        All ranks take the centres of rank 0.

        Args:
            centres: (K, 1, Z) from :class:`mcibi_fast.nn.clustering.PixelSample`; a class whose
                centre is zero is not changed.
        """
        if centres.shape != (self.num_classes, 1, self.channels):
            raise ValueError(
                f"centres: expected {(self.num_classes, 1, self.channels)}, "
                f"got {tuple(centres.shape)}"
            )
        centres = _of_rank_zero(centres[:, 0].to(self.memory, copy=True))
        statistics = self._statistics(centres)
        found = finite_rows(statistics, centres.any(1) & ~self.met)
        self.memory.copy_(torch.where(found[:, None], statistics, self.memory))
        self.met.logical_or_(found)

    def _updated(self, features: Tensor, labels: Tensor) -> Tensor:
        # A float argument of an op is a constant of a compiled graph: one that changes at every
        # step would compile the graph again each time. So a scheduled momentum is multiplied
        # outside the op; for absent classes the difference is zero.
        poly = self.momentum_schedule == "poly"
        updated = ops.memory_update(
            self.memory,
            features,
            labels,
            momentum=1.0 if poly else self.momentum,
            unbiased=self.unbiased,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            group=_process_group(),
        )
        return self.memory + self.momentum * (updated - self.memory) if poly else updated

    def _statistics(self, vectors: Tensor) -> Tensor:
        """Mean and standard deviation (K, 2) over the channels of (K, Z), Eq. 9."""
        mean, std = vectors.mean(1), vectors.std(1, correction=int(self.unbiased))
        return torch.stack([mean, std], dim=1).to(self.memory.dtype)

    def _noise(self) -> Tensor | ops.Philox:
        if self.noise_table is not None:
            return self.noise_table
        fresh = self.noise == "fresh" and self.training
        return ops.Philox(remembered(self.noise_state) if fresh else self.fixed_noise_state)

    def _read(self) -> Tensor:
        """The memory; while training, which updates it, a copy."""
        return remembered(self.memory) if self.training else self.memory

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "memory" in state_dict:
            self.met.fill_(True)

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, {self.channels}, momentum={self.momentum}, "
            f"unbiased={self.unbiased}, noise={self.noise!r}, init={self.init!r}, "
            f"fixed={self.fixed}"
        )


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
