"""MCIBI's memory: class representations themselves instead of their distribution.

MCIBI (ICCV 2021, arXiv 2108.11819) is the predecessor of MCIBI++. Its memory is called "Memory-R"
in Table 3 and appears in the MCIBI rows of Table 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.nn.attention import mix_rows
from mcibi_fast.nn.bilinear import Taps, upsampling_taps
from mcibi_fast.nn.class_memory import (
    ClassMemory,
    Init,
    MomentumSchedule,
    _check_choice,
    _from_first_rank,
    _of_rank_zero,
    _pooled,
)
from mcibi_fast.ops.finite import finite_rows
from mcibi_fast.ops.recompute import once, remembered
from mcibi_fast.ops.snapshot import snapshot

Strategy = Literal["mean", "cosine_similarity"]


class RepresentationMemory(ClassMemory):
    """Dataset-level representations of every class: (K, n, Z), zero until a class is seen.

    The first n times that a class occurs, the mean of its pixels is copied to the next of its n
    representations. From then on each moves towards a target, M <- (1 - m) M + m target:

    * ``strategy="mean"``: the mean of the class's pixels.
    * ``strategy="cosine_similarity"``: sum_i w_i R_i, w_i = (1 - s_i) / sum (1 - s_i), s_i the
      cosine between pixel and representation: pixels that are least like the memory weigh most.
      With n > 1 each pixel counts only for the representation nearest to it; as in the released
      code, a representation that is nearest to no pixel moves towards zero.

    :class:`DatasetLevelContext` takes it instead of a :class:`GaussianMemory`.

    The only state-dict key is ``memory`` (K, n, Z), as the released code saves it: float32, or
    float64 after ``.double()``. ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` do not change its
    dtype.

    Args:
        num_classes: K.
        channels: Z, the channels of the pixel representations.
        representations: n, per class; more than one needs "cosine_similarity".
        strategy: see above.
        momentum: m, in [0, 1]; a plain attribute that may be set at any time.
        momentum_schedule: "poly" scales the momentum with the learning rate, as the released code
            does, see ``schedule``; "fixed" keeps it.
        fixed: representations never change once they are set ("Memory-R" without update in
            Table 3).
        init: "standard": zero until the class's first pixels set it. "pixel": each is one pixel,
            see :meth:`initialize`. "cluster": the centres of n clusters, see
            :meth:`initialize_from`.
        seed: seed for the pixels that ``initialize`` picks; give every rank the same one.
        ignore_index: label that belongs to no class.
        align_corners: whether features are upsampled to the labels' size with aligned corners.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        representations: int = 1,
        *,
        strategy: Strategy = "cosine_similarity",
        momentum: float = 0.9,
        momentum_schedule: MomentumSchedule = "fixed",
        fixed: bool = False,
        init: Init = "standard",
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> None:
        super().__init__(
            num_classes,
            channels,
            momentum=momentum,
            momentum_schedule=momentum_schedule,
            fixed=fixed,
            init=init,
            seed=seed,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        _check_choice("strategy", strategy, ("mean", "cosine_similarity"))
        if representations < 1:
            raise ValueError(f"representations: must be at least 1, got {representations}")
        if representations > 1 and strategy == "mean":
            raise ValueError(
                "strategy: 'mean' keeps one representation per class; with "
                f"representations={representations} use 'cosine_similarity'"
            )
        self.per_class = representations
        self.strategy = strategy
        self.register_buffer("memory", torch.zeros(num_classes, representations, channels))

    def representations(self) -> Tensor:
        """C_dl (K, Z); only for a memory with one representation per class."""
        if self.per_class > 1:
            raise ValueError(
                f"representations: there are {self.per_class} per class; read the attribute memory "
                "(K, n, Z), or build the memory with representations=1"
            )
        return self.read()[:, 0]

    def reset_parameters(self) -> None:
        """Forgets everything, as after ``__init__``; also for a memory without values yet."""
        self.memory.zero_()

    @property
    def met(self) -> Tensor:
        """(K,): whether all n representations of the class are set."""
        return (self.memory != 0).any(dim=2).all(dim=1)

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12) from the logits of W: (B, K, h, w) -> (B, n Z, h, w), n maps in a row.

        With ``hard``, W is one-hot at the largest logit (the first one on ties).
        """
        return mix_rows(weight_logits, self.read().flatten(1), hard=hard)

    def read(self, *, after_update: bool = False) -> Tensor:
        """A copy of the memory (K, n, Z), which the update of a training step does not change.

        Args:
            after_update: it is read after the update of the step.
        """
        if not self.training:
            return snapshot(self.memory)
        return remembered(self.memory, after_update=after_update)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Moves the representations of the classes present in ``labels`` now.

        A context that is called with labels needs no call of it; in its steps a call takes the
        place of the automatic update.

        All ranks of the default process group pool their batches: the result is what one process
        with the whole batch would compute. A class whose statistics are not finite, as after an
        overflow in float16, keeps its row and is counted, see :func:`mcibi_fast.ops.kept_rows`.
        Nothing waits for the device, and features are not upsampled. Besides the K x n x Z results,
        "cosine_similarity" allocates two copies of the features and 3 K n numbers per pixel at the
        features' resolution, and about 3 n + 20 numbers per pixel at the labels' resolution; "mean"
        allocates only what ``ops.class_feature_sums`` does. On CUDA "cosine_similarity" sums in no
        fixed order, so its bits are the same in every run only under
        ``torch.use_deterministic_algorithms``.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.

        Raises:
            TypeError, ValueError: as in ``ops.class_feature_sums``, or the channels are not Z.
        """
        super().update(features, labels)

    @property
    def _weighs(self) -> bool:
        return self.strategy == "cosine_similarity" and not self.fixed

    def _collect(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        sums = ops.class_feature_sums(
            features,
            labels,
            self.num_classes,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        return [*sums, *(self._least_known(features, labels) if self._weighs else ())]

    def _nothing(self) -> list[Tensor]:
        sums = self.memory.new_zeros(self.num_classes, self.channels)
        nothing = [sums, torch.zeros_like(sums[:, 0], dtype=torch.int64)]
        if self._weighs:
            nothing += [torch.zeros_like(self.memory), torch.zeros_like(self.memory[..., 0])]
        return nothing

    def _learn(self, statistics: Sequence[Tensor], steps: int | Tensor) -> None:
        sums, counts, *weighted_sums = _pooled(statistics)
        mean = (sums / counts.clamp(min=1)[:, None])[:, None]  # (K, 1, Z)
        target = mean
        if weighted_sums:
            weighted, weights = weighted_sums
            target = weighted / weights.where(weights > 0, 1)[..., None]  # (K, n, Z)
            target = target.where(mean.isfinite().all(dim=2, keepdim=True), torch.nan)
        empty = (self.memory == 0).all(dim=2, keepdim=True)  # (K, n, 1)
        next_empty = empty & (empty.cumsum(dim=1) == 1)
        updated = self.memory
        if not self.fixed:
            moved = (1 - self.momentum) * self.memory + self.momentum * target
            updated = torch.where(empty.any(dim=1, keepdim=True), self.memory, moved)
        updated = torch.where(next_empty, mean, updated).to(self.memory.dtype)
        moves = finite_rows(updated, counts > 0)[:, None, None]
        self.memory.copy_(once(torch.where(moves, updated, self.memory), self.memory))

    @torch.no_grad()
    def initialize(self, features: Tensor, labels: Tensor) -> None:
        """Sets the empty representations of each class to random pixels of the class.

        Call it on batches of the train split until ``met.all()``. Across ranks, the first rank that
        sees a class decides; every rank must call it.

        Args:
            features: R (B, Z, h, w).
            labels: (B, H, W), any integer dtype.
        """
        self._check_features(features)
        for _ in range(self.per_class):
            empty = (self.memory == 0).all(dim=2)
            pixels, counts = ops.class_feature_sums(
                features,
                self._pick_pixels(labels, self.seed + int((~empty).sum())),
                self.num_classes,
                ignore_index=self.ignore_index,
                align_corners=self.align_corners,
            )
            pixels = pixels.to(self.memory.dtype)
            found = finite_rows(pixels, counts > 0)  # else a pixel of a later batch is taken
            pixels, found = _from_first_rank(pixels, found)
            next_empty = empty & (empty.cumsum(dim=1) == 1) & found[:, None]
            self.memory.copy_(torch.where(next_empty[..., None], pixels[:, None], self.memory))

    @torch.no_grad()
    def initialize_from(self, centres: Tensor) -> None:
        """Sets the empty representations to the centres (K, n, Z); zero centres leave them empty.

        This is MCIBI's initialisation by clustering;
        :class:`mcibi_fast.nn.clustering.PixelSample` finds the centres. All ranks take the result
        of rank 0.
        """
        if centres.shape != self.memory.shape:
            raise ValueError(
                f"centres: expected {tuple(self.memory.shape)}, got {tuple(centres.shape)}"
            )
        empty = (self.memory == 0).all(dim=2, keepdim=True)
        updated = torch.where(empty, centres.to(self.memory), self.memory)
        found = finite_rows(updated, empty.flatten(1).any(1))[:, None, None]
        self.memory.copy_(_of_rank_zero(torch.where(found, updated, self.memory)))

    def _least_known(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        """Sums (K, n, Z) of the pixels weighted by 1 - s, and sums of the weights (K, n).

        Nothing is upsampled. A pixel is a bilinear mean of four low-resolution pixels, so its
        scalar product with a representation is the same mean of their scalar products, and its norm
        follows from their scalar products with each other. The weighted sum is the adjoint: each
        pixel's weight is spread over the four, and the low-resolution features are summed with the
        weights that these receive.
        """
        R = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
        # Zero times infinity would be NaN in the sums of every class; those of the classes that an
        # infinity belongs to show in their plain sums.
        R = R.where(R.isfinite(), 0)
        B, _, h, w = R.shape
        K, n = self.num_classes, self.per_class
        labels = labels.long()
        known = (labels >= 0) & (labels < K) & (labels != self.ignore_index)
        classes = labels.where(known, 0)
        M = self.memory.to(R.dtype)
        taps = upsampling_taps((h, w), labels.shape[1:], self.align_corners, R)

        products = (M.flatten(0, 1) @ R.flatten(2)).mT.reshape(B * h * w * K, n)  # M R
        images = torch.arange(B, device=R.device)[:, None, None] * (h * w)
        product = R.new_zeros(*labels.shape, n)
        for position, weight in taps.corners:
            index = (images + position) * K + classes  # (B, H, W)
            product += products[index] * weight[..., None]
        cosine = product / (
            _norms(R, taps).clamp(min=1e-8)[..., None] * M.norm(dim=2).clamp(min=1e-8)[classes]
        )
        cosine, nearest = cosine.max(dim=3)  # (B, H, W)
        # At least eps: pixels that all equal the memory weigh the same (the released code: 0 / 0).
        weights = (1 - cosine).clamp(min=torch.finfo(R.dtype).eps).where(known, 0)

        row = classes * n + nearest
        adjoint = R.new_zeros(B * h * w * K * n)
        for position, weight in taps.corners:
            index = (images + position) * (K * n) + row
            adjoint.index_add_(0, index.flatten(), (weights * weight).flatten())
        sums = (R.flatten(2) @ adjoint.view(B, h * w, K * n)).sum(0).mT  # (K n, Z)
        # Corner weights sum to one, so every pixel's weight is in the adjoint exactly once.
        return [sums.unflatten(0, (K, n)), adjoint.view(-1, K * n).sum(0).view(K, n)]

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, {self.channels}, representations={self.per_class}, "
            f"strategy={self.strategy!r}, momentum={self.momentum}, init={self.init!r}, "
            f"fixed={self.fixed}"
        )


def _norms(R: Tensor, taps: Taps) -> Tensor:
    """Norms (B, H, W) of the upsampled features, from the scalar products of neighbours."""
    below = torch.cat([R[:, :, 1:], R[:, :, -1:]], dim=2)
    square, vertical = (R * R).sum(1), (R * below).sum(1)  # (B, h, w)
    falling, rising = ((a[..., :-1] * b[..., 1:]).sum(1) for a, b in ((R, below), (below, R)))
    horizontal = (R[..., :-1] * R[..., 1:]).sum(1)
    # The last column's right neighbour is itself.
    horizontal = torch.cat([horizontal, square[..., -1:]], dim=2)
    falling, rising = (torch.cat([d, vertical[..., -1:]], dim=2) for d in (falling, rising))

    def at(products: Tensor, i: int, j: int) -> Tensor:
        return products[:, taps.y[i]][:, :, taps.x[j]]

    (top, bottom), (left, right) = taps.wy[..., None], taps.wx
    total = top * bottom * left * right * 2 * (at(falling, 0, 0) + at(rising, 0, 0))
    for j, weight in enumerate((left, right)):
        total += top * bottom * weight**2 * 2 * at(vertical, 0, j)
        for i, other in enumerate((top, bottom)):
            total += weight**2 * other**2 * at(square, i, j)
    for i, weight in enumerate((top, bottom)):
        total += weight**2 * left * right * 2 * at(horizontal, i, 0)
    return total.clamp(min=0).sqrt()
