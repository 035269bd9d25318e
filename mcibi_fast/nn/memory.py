"""The memory module M: one Gaussian per class (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.nn.class_memory import (
    Init,
    MomentumSchedule,
    _check_choice,
    _pooled,
    _process_group,
)
from mcibi_fast.nn.noise import Noise, NoisyMemory
from mcibi_fast.ops.memory_update.reference import moving_average
from mcibi_fast.ops.recompute import once

Form = Literal["paper", "released"]
_UNSET = [0.0, 1.0]  # mean and deviation of a class that was never set


class GaussianMemory(NoisyMemory):
    """The distribution of every class over the dataset: its mean and standard deviation.

    ``form`` sets the three choices below at once; each can also be given separately.

    | choice | "paper" | "released" (published checkpoints) |
    | --- | --- | --- |
    | ``unbiased`` | False: Eq. 9 divides by Z | True: divides by Z - 1 |
    | ``noise`` | "fresh": new in every training step, fixed at evaluation | "released": fixed |
    | ``init`` | "pixel": one pixel per class, see `initialize` | "standard": mean 0, deviation 1 |

    "released" noise is one float32 table whose class k is drawn with seed k.

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
        momentum: m of Eq. 6, in [0, 1]; a plain attribute that may be set at any time, also of a
            compiled model.
        momentum_schedule: "poly" scales the momentum with the learning rate (Table 4), see
            ``schedule``; "fixed" keeps it.
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

        self.register_buffer("memory", torch.tensor([_UNSET] * num_classes, dtype=torch.float32))
        self._hold("met", self._initially_met())
        self._hold_noise(noise or ("fresh" if paper else "released"))

    def _initially_met(self) -> Tensor:
        return torch.tensor([self.init == "standard"] * self.num_classes, device="cpu")

    @property
    def met(self) -> Tensor:
        """(K,): which classes have been set; the tensor itself, which may be changed in place."""
        met = self._held("met", self.memory.device)
        if not met.is_meta:  # some loaders write the memory behind the module's back
            mean, deviation = self.memory.detach().unbind(1)
            met |= (mean != _UNSET[0]) | (deviation != _UNSET[1])  # not a copy, which would wait
        return met

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

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Moves the classes present in ``labels`` towards their statistics now (Eqs. 6-9).

        A context that is called with labels needs no call of it; in its steps a call takes the
        place of the automatic update.

        All ranks of the default process group pool their batches: the result is what one process
        with the whole batch would compute. A class whose statistics are not finite, as after an
        overflow in float16, keeps its row and is counted, see :func:`mcibi_fast.ops.kept_rows`.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        super().update(features, labels)

    @torch.no_grad()
    def _update(self, features: Tensor, labels: Tensor) -> None:
        if not self.fixed:
            self._move(
                lambda momentum: ops.memory_update(
                    self.memory,
                    features,
                    labels,
                    momentum=momentum,
                    unbiased=self.unbiased,
                    ignore_index=self.ignore_index,
                    align_corners=self.align_corners,
                    group=_process_group(),
                )
            )
        self._draw_next()

    def _collect(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        return [] if self.fixed else list(self._sums(features, labels))

    def _nothing(self) -> list[Tensor]:
        return [] if self.fixed else list(self._no_sums())

    def _learn(self, statistics: Sequence[Tensor], steps: int | Tensor) -> None:
        if statistics:
            sums, counts = _pooled(statistics)
            self._move(lambda m: moving_average(self.memory, sums, counts, m, self.unbiased))
        self._draw_next(steps)

    def _move(self, updated_by: Callable[[float], Tensor]) -> None:
        # A float argument of an op is a constant of a compiled graph: one that changes at every
        # step would compile the graph again each time. So a scheduled momentum is multiplied
        # outside the op, as any is while compiling; for absent classes the difference is zero.
        outside = self.momentum_schedule == "poly" or torch.compiler.is_compiling()
        updated = updated_by(1.0 if outside else self.momentum)
        if outside:
            updated = self.memory + self.momentum * (updated - self.memory)
        self.memory.copy_(once(updated, self.memory))

    def _statistics(self, vectors: Tensor) -> Tensor:
        """Mean and standard deviation (K, 2) over the channels of (K, Z), Eq. 9."""
        mean, std = vectors.mean(1), vectors.std(1, correction=int(self.unbiased))
        return torch.stack([mean, std], dim=1).to(self.memory.dtype)

    def _set(self, rows: Tensor, found: Tensor) -> None:
        super()._set(rows, found)
        self.met.logical_or_(found)

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
