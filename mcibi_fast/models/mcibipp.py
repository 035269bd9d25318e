"""The head of MCIBI++, whose memory holds one Gaussian per class, or others to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.nn.class_memory import ClassMemory, Init, MomentumSchedule, _check_choice
from mcibi_fast.nn.diagonal_memory import DiagonalMemory
from mcibi_fast.nn.learnt_memory import LearntMemory
from mcibi_fast.nn.memory import GaussianMemory
from mcibi_fast.nn.noise import Noise
from mcibi_fast.nn.one_logit import classes_of_memory

MemoryForm = Literal["paper", "released", "diagonal", "learnt"]


class MCIBIPPHead(MemoryHead):
    """Augments the last stage's features with dataset-level context and classifies them (Eqs. 1-5).

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first; the last one feeds
            the head, the one before it the auxiliary head.
        form: "released" (published checkpoints) or "paper" (the equations as printed); sets
            ``projections``, ``mixing``, ``unbiased``, ``noise`` and ``init``, each of which can
            also be given separately. Two more, ours, are the released form with another memory:
            "diagonal" keeps a Gaussian per class and channel (:class:`DiagonalMemory`), and
            "learnt" a vector per class that is learnt by gradient, or random and fixed without
            ``memory_update`` (:class:`LearntMemory`).
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
        form: MemoryForm = "released",
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
        _check_choice("form", form, get_args(MemoryForm))
        K = classes_of_memory(num_classes)
        memory: ClassMemory
        if form == "learnt":
            memory = LearntMemory(K, feats_channels, fixed=not memory_update, seed=seed)
        else:
            settings: dict[str, Any] = {
                "momentum": momentum,
                "momentum_schedule": momentum_schedule,
                "fixed": not memory_update,
                "seed": seed,
                "ignore_index": ignore_index,
                "align_corners": align_corners,
            }
            if form == "diagonal":
                settings |= {"noise": noise or "released", "init": init or "standard"}
                memory = DiagonalMemory(K, feats_channels, **settings)
            else:
                settings |= {"noise": noise, "init": init, "unbiased": unbiased, "form": form}
                memory = GaussianMemory(K, feats_channels, **settings)
        super().__init__(
            num_classes,
            in_channels,
            memory=memory,
            form="paper" if form == "paper" else "released",
            feats_channels=feats_channels,
            ignore_index=ignore_index,
            align_corners=align_corners,
            **options,
        )
