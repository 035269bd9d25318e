"""The dataset-level context in front of the classifier of other libraries' models.

Each ``compat.<library>.with_mcibi`` puts a :class:`ContextClassifier` where the model has its last
convolution, and adds its loss in the library's own way.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory
from mcibi_fast.nn.attention import Projections
from mcibi_fast.nn.class_memory import MomentumSchedule
from mcibi_fast.nn.context import Fusion, resize
from mcibi_fast.nn.iterative import Mixing, mix
from mcibi_fast.nn.memory import Form


class ContextClassifier(nn.Module):
    """A convolution to the classes, applied to R_aug instead of R (Eqs. 1, 4 and 5).

    Args:
        classifier: the model's last convolution, which keeps its weights.
        dropout: what the model drops before it; it moves behind the context, so that the memory
            learns from all of R.
        form: "released" (as the authors' code) or "paper" (the equations as printed); sets
            ``projections`` and ``mixing``, and the memory's choices (:class:`GaussianMemory`).
        transform_channels: T, the width of the attention.
        projections, fusion, hard, downsample: see :class:`DatasetLevelContext`.
        pool: W and the context are computed on R averaged over squares of this many pixels a side,
            and the context is resized back. The attention's cost grows with the fourth power of the
            map's side, so maps at stride 4 should be pooled by 2, and those at stride 1 by 8.
        momentum: m of Eq. 6; afterwards ``context.memory.momentum`` may be set at any time.
        momentum_schedule: "fixed", or "poly": in each step m is multiplied by the learning rate
            divided by the initial one, which is read from the optimiser
            (:meth:`mcibi_fast.nn.class_memory.ClassMemory.schedule`).
        alpha: weight of the loss of W (Eq. 16).
        stages: stages of the coarse-to-fine iterative inference in evaluation mode (section 3.5);
            1 means no iteration. May be set at any time.
        mixing, stage_weights: how the next stage's W is computed, see
            :class:`mcibi_fast.models.memory_head.MemoryHead`.
        context_dropout: channel dropout in H_pr.
        seed: seed of the memory's noise; give every rank the same one.
        ignore_index: label that counts neither in the loss of W nor in the memory.
        align_corners: whether the library's bilinear resizing aligns corners.

    Shape: R (B, Z, h, w) -> logits (B, K, h, w), as the convolution.

    Raises:
        ValueError: an option out of range, or fewer than two classes.
    """

    def __init__(
        self,
        classifier: nn.Conv2d,
        dropout: nn.Module | None = None,
        *,
        form: Form = "released",
        transform_channels: int = 256,
        projections: Projections | None = None,
        fusion: Fusion = "concatenation",
        hard: bool = False,
        downsample: bool = False,
        pool: int = 1,
        momentum: float = MOMENTUM,
        momentum_schedule: MomentumSchedule = "fixed",
        alpha: float = 0.4,
        stages: int = 1,
        mixing: Mixing | None = None,
        stage_weights: tuple[float, float] = (2.0, 1.5),
        context_dropout: float = 0.1,
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if classifier.out_channels < 2:
            raise ValueError(
                "with_mcibi: needs a model of two classes or more, with one logit each"
            )
        for name, value in (("pool", pool), ("stages", stages)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        mixing = mixing or form
        if mixing not in ("paper", "released"):
            raise ValueError(f"mixing: expected 'paper' or 'released', got {mixing!r}")
        memory = GaussianMemory(
            classifier.out_channels,
            classifier.in_channels,
            form=form,
            init="standard",
            momentum=momentum,
            momentum_schedule=momentum_schedule,
            seed=seed,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        self.context = DatasetLevelContext(
            memory,
            transform_channels=transform_channels,
            projections=projections or form,
            fusion=fusion,
            hard=hard,
            downsample=downsample,
            dropout=context_dropout,
            align_corners=align_corners,
        )
        self.dropout = dropout or nn.Identity()
        self.classifier = classifier
        self.pool, self.alpha, self.stages = pool, alpha, stages
        self.mixing: Mixing = mixing
        self.stage_weights = stage_weights
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.keeps: bool = False  # whether this forward's loss is asked for in evaluation as well
        self._last: tuple[Tensor, Tensor] | None = None  # R and the logits of W, for ``loss``

    def forward(self, features: Tensor) -> Tensor:
        R = features if self.pool == 1 else F.avg_pool2d(features, self.pool, ceil_mode=True)
        weight_logits = self.context.weight_head(R)  # of W, Eq. 10
        query, fused = self.context.project(R), self.context.fuse.prepare(features)

        def classify(weights: Tensor) -> Tensor:
            context = self.context.attend(query, weights, R.shape[2:])
            context = resize(context, features.shape[2:], self.align_corners)
            return self.classifier(self.dropout(self.context.fuse(fused, context)))

        logits = classify(weight_logits)
        if not self.training:
            for _ in range(1, self.stages):
                logits = classify(self._next_weights(weight_logits, logits))
        self._keep(R, weight_logits)
        return logits

    def loss(self, labels: Tensor) -> Tensor:
        """alpha times L_W (Eqs. 14 and 16) of the last forward; add it to the model's loss.

        It is the mean cross entropy over the valid pixels. In training its backward pass also lets
        the next optimiser step update the memory
        (:meth:`mcibi_fast.nn.DatasetLevelContext.forward`). It can be called once per forward.

        Args:
            labels: (B, H, W) or (B, 1, H, W), any integer dtype.

        Raises:
            RuntimeError: there was no forward in training mode since the last call.
        """
        if self._last is None:
            raise RuntimeError(
                "mcibi_loss: call the model in training mode first; each forward has one loss"
            )
        (R, weight_logits), self._last = self._last, None
        labels = labels[:, 0] if labels.ndim == 4 else labels
        if self.training:
            (weight_logits,) = self.context.memory.observe(R, labels, weight_logits)
        return self.alpha * ops.upsample_cross_entropy(
            weight_logits,
            labels,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )

    def train(self, mode: bool = True) -> ContextClassifier:
        """Switches to training mode, or to evaluation mode; forgets the last forward."""
        self._last = None
        return super().train(mode)

    def _keep(self, R: Tensor, weight_logits: Tensor) -> None:
        if self._last is not None and self._last[1].requires_grad:
            warnings.warn(
                "with_mcibi: the loss of W was not asked for after the last forward, so it is not "
                "learnt and the memory is not updated; add model.mcibi_loss(labels) to the loss",
                stacklevel=2,
            )
        self._last = (R.detach(), weight_logits) if self.training or self.keeps else None

    def _next_weights(self, weight_logits: Tensor, logits: Tensor) -> Tensor:
        return mix(
            self.mixing,
            weight_logits,
            logits,
            weights=self.stage_weights,
            align_corners=self.align_corners,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, stages={self.stages}, pool={self.pool}"


def context_of(model: nn.Module) -> ContextClassifier:
    """The part that ``with_mcibi`` put into a model: its ``context.memory``, ``stages``, ...

    Raises:
        ValueError: the model has none.
    """
    for module in model.modules():
        if isinstance(module, ContextClassifier):
            return module
    raise ValueError(f"context_of: {type(model).__name__} was not given to with_mcibi")


def insert(
    model: nn.Module, classifier: str, options: dict[str, Any], *, dropout: str | None = None
) -> ContextClassifier:
    """Puts a :class:`ContextClassifier` in the place of a convolution.

    Args:
        model: any module.
        classifier: the convolution's name in it.
        options: of the :class:`ContextClassifier`.
        dropout: name of the dropout before it; that of an ``nn.Sequential`` is found.

    Raises:
        ValueError: the model has a context already, or no convolution there.
    """
    if any(isinstance(module, ContextClassifier) for module in model.modules()):
        raise ValueError(f"with_mcibi: {type(model).__name__} has a context already")
    conv = model.get_submodule(classifier)
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        raise ValueError(
            f"with_mcibi: {classifier} is a {type(conv).__name__}; expected a plain convolution"
        )
    parent, _, child = classifier.rpartition(".")
    if isinstance(model.get_submodule(parent), nn.Sequential) and int(child) > 0:
        before = f"{parent}.{int(child) - 1}".lstrip(".")
        if isinstance(model.get_submodule(before), _DropoutNd):
            dropout = before
    dropped = None
    if dropout is not None:
        dropped = getattr(model.get_submodule(_parent(dropout)), _child(dropout))
    placed = ContextClassifier(conv, dropped, **options)
    placed.to(conv.weight.device, conv.weight.dtype).train(conv.training)
    if dropout is not None and dropped is not None:
        setattr(model.get_submodule(_parent(dropout)), _child(dropout), nn.Identity())
    setattr(model.get_submodule(parent), child, placed)
    return placed


def last_conv(model: nn.Module, within: str) -> str:
    """The name of the last convolution in a part of the model, by the order of registration.

    Raises:
        ValueError: there is none.
    """
    names = [
        name
        for name, module in model.get_submodule(within).named_modules(prefix=within)
        if isinstance(module, nn.Conv2d)
    ]
    if not names:
        raise ValueError(f"with_mcibi: {within} of {type(model).__name__} has no convolution")
    return names[-1]


def is_a(model: nn.Module, name: str) -> bool:
    """Whether the model's class has, or inherits from one that has, this name."""
    return any(cls.__name__ == name for cls in type(model).__mro__)


def unknown(model: Any, library: str, known: str) -> ValueError | TypeError:
    """The error for a model that is not one of those that are known."""
    if not isinstance(model, nn.Module):
        return TypeError(f"with_mcibi: expected a torch.nn.Module, got {type(model).__name__}")
    return ValueError(
        f"with_mcibi: {type(model).__name__} is not known; of {library} these are: {known}. For "
        "any other decoder use mcibi_fast.nn.DatasetLevelContext"
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _child(name: str) -> str:
    return name.rpartition(".")[2]
