"""The head of MCIBI++, whose memory holds one Gaussian per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.nn.class_memory import Init, MomentumSchedule
from mcibi_fast.nn.memory import Form, GaussianMemory, Noise


class MCIBIPPHead(MemoryHead):
    """Augments the last stage's features with dataset-level context and classifies them (Eqs. 1-5).

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first; the last one feeds
            the head, the one before it the auxiliary head.
        form: "released" (published checkpoints) or "paper" (the equations as printed); sets
            ``projections``, ``mixing``, ``unbiased``, ``noise`` and ``init``, each of which can
            also be given separately.
        feats_channels: Z, channels of the pixel representations.
        momentum, momentum_schedule, unbiased, noise, init, seed: see :class:`GaussianMemory`.
        memory_update: whether training changes the memory once it is initialised (Table 3).
        ignore_index: label that counts neither in the losses nor in the memory.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`MemoryHead`.
    """

    concatenates_context = True

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        form: Form = "released",
        feats_channels: int = 512,
        momentum: float = MOMENTUM,
        momentum_schedule: MomentumSchedule = "fixed",
        memory_update: bool = True,
        unbiased: bool | None = None,
        noise: Noise | None = None,
        init: Init | None = None,
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        memory = GaussianMemory(
            num_classes,
            feats_channels,
            form=form,
            momentum=momentum,
            momentum_schedule=momentum_schedule,
            fixed=not memory_update,
            unbiased=unbiased,
            noise=noise,
            init=init,
            seed=seed,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        super().__init__(
            num_classes,
            in_channels,
            memory=memory,
            form=form,
            feats_channels=feats_channels,
            ignore_index=ignore_index,
            align_corners=align_corners,
            **options,
        )
