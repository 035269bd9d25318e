"""Video models: Video-MCIBI++ and Video-MCIBI (section 3.6), and the base of other methods.

In the first two, the fusion F_T also takes the contexts of past frames (Eqs. 18 and 19).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mcibi_fast.models.fine_tuning import Beginning, take_what_fits
from mcibi_fast.models.flow import Frames
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.memory_head import MemoryHead, WeightsFrom
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.weights import (
    check_names,
    check_shapes,
    find_weights,
    read_spec,
    read_weights,
)
from mcibi_fast.nn.attention import ClassQuery
from mcibi_fast.nn.context import Concatenation, ContextState, Past

Recall = Callable[[Any], Sequence[Any]]
"""A function that stores what a frame leaves for later frames, a tensor (B, ...) or a tuple of
tensors, and returns what the past frames at the head's ``offsets`` left, the earliest first."""

_FUSING = "head.context.fuse.conv.0.weight"


class VideoHead(MemoryHead):
    """A head whose fusion F_T also takes a map from each of the h frames before (Eq. 19).

    It is the first base class of a video model's head, followed by a framework and the head of a
    memory: see :class:`SegmentationHead`.

    Each past frame goes through the same modules as the current one, all frames in one call:
    R_{N-i}, the weights W_{N-i} (Eq. 18) and C_bi^{N-i} (Eqs. 11-13). In Eq. 18 W_{N-i} comes from
    H_pr; here it comes from the same head as the current frame's W, so with ``weights_from="cwi"``
    (the default of the released form) it is the within-image head for all frames. Past frames enter
    the fusing convolution, (2 + h) Z -> Z channels, and nothing else: no pyramid, no classifier. In
    every stage of iterative inference they enter with their first stage's W. Losses and the update
    of the memory are those of the current frame; gradients also flow through the past frames, which
    share the weights.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        history: h, at least 1.
        past: what is taken from a past frame: "context", C_bi^{N-i}, or "features", R_{N-i}
            (Table 16).
        weights_from: as for the image model's head, except "labels": only frame N has labels.
        options: options of the image model's head; ``fusion`` must be "concatenation".
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        history: int = 2,
        past: Past = "context",
        weights_from: WeightsFrom = "auto",
        **options: Any,
    ) -> None:
        if history < 1:
            raise ValueError(f"history: expected at least 1 past frame, got {history}")
        if weights_from == "labels":
            raise ValueError(
                "weights_from: 'labels' would need labels of the past frames, which have none"
            )
        super().__init__(num_classes, in_channels, weights_from=weights_from, **options)
        if not isinstance(self.context.fuse, Concatenation):
            raise ValueError("fusion: past frames need 'concatenation'")
        Z = self.memory.channels
        self.context.fuse = Concatenation(Z, Z, history=history, past=past)
        self.history, self.past = history, past

    @property
    def offsets(self) -> Sequence[int]:
        return range(self.history, 0, -1)

    def forward(  # type: ignore[override]
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        recall: Recall | None = None,
        stages: int | None = None,
    ) -> SegmentationOutput:
        """Classifies the last frame; see :meth:`MemoryHead.forward`.

        Args:
            features: the backbone's maps of all frames of B clips, each ((h + 1) B, c, h', w') and
                ordered by frame: the B earliest ones first. With ``recall`` only those of the
                current frames.
            labels: (B, H, W), labels of the last frames.
            recall: provides the maps of the past frames instead (streaming).
            stages: number of stages of iterative inference.
        """
        if self.training:
            self._refuse_if_folded()
        batch = len(features[-1]) // (1 if recall else self.history + 1)
        last = [m[-batch:] for m in features]
        R_all = self._run(self.pixel_representations, features)
        R = R_all[-batch:]
        # All frames whose C_bi is needed go through the attention in one launch.
        seen, maps = (R_all, features) if self.past == "context" else (R, last)
        gather = self._run(self.context.weight_head, seen)  # Eqs. 10 and 18
        if self.weights_from == "cwi":
            weights = self._weights(maps, seen, gather)
            gather = weights.gather
            weights = weights.last(batch)
        else:
            weights = self._weights(last, R, gather[-batch:])
        query = self._run(self.context.project, seen)
        contexts = self._run(self.context.attend, query, gather, seen.shape[2:])

        left = contexts if self.past == "context" else R_all
        past = recall(left) if recall else left[:-batch].chunk(self.history)
        fused = self._run(self.context.fuse.prepare, R, past)
        image = self._prepare(last, ContextState(_last(query, batch), fused), weights.within)
        logits = self._classify(image, self._run(self.context.fuse, fused, contexts[-batch:]))
        logits = self._iterate(image, weights.gather, logits, stages)
        return self._output(last, R, labels, logits, weights, image)


def _last(query: Tensor | ClassQuery, batch: int) -> Tensor | ClassQuery:
    """The part of the queries that belongs to the last frames."""
    if isinstance(query, ClassQuery):
        return query._replace(scores=query.scores[-batch:])
    return query[-batch:]


class VideoMethod(SegmentationHead):
    """The base of other methods for videos, which are combined with a framework as memories are.

    A method is the first base class of its models' heads, as :class:`VideoHead` is, and is declared
    by :func:`mcibi_fast.models.registry.video_method`. Its ``forward`` takes the maps of all frames
    of a clip, or those of one frame and ``recall``, and with ``takes_frames`` the frames.

    Attributes:
        usual_history: number of past frames in a clip if none is given.
        usual_gap: number of frames from one frame of a clip to the next if none is given.
        added_modules: what its heads have besides the modules of the framework.
    """

    usual_history: ClassVar[int] = 1
    usual_gap: ClassVar[int] = 1
    added_modules: ClassVar[tuple[str, ...]] = ()
    # Those of PlainHead, which is the last base class of a head without a memory.
    decoder: Any
    bottleneck: Any
    decoder_input: Any
    losses: Any
    _first_prediction: Any


class VideoSegmentor(Segmentor):
    """Computes, from clips of several frames, the logits of the last frame.

    Its images are (B, h + 1, 3, H, W), the earliest frame first; at the beginning of a video its
    first frame is repeated. In evaluation h is the number of the head's ``offsets``. Or, in
    evaluation, (B, 3, H, W): videos of one frame. Labels (B, H, W) are those of the last frames.

    Args:
        backbone: images (B, 3, H, W) -> list of feature maps, finest first.
        head: a :class:`VideoHead` or a :class:`VideoMethod`.

    ``inference.stream.VideoStream`` computes the same from a video's frames one by one.
    """

    def _segment(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        any_size: bool = False,
        **options: Any,
    ) -> SegmentationOutput:
        if images.ndim == 4:
            if self.training:
                raise ValueError(
                    f"images: a video model is trained on clips, (B, {self.history + 1}, 3, H, W); "
                    f"the data gave single frames (data.history={self.history} gives clips)"
                )
            if not self.head.offsets:
                return super()._segment(images, labels, any_size=any_size, **options)
            return self.step(
                images,
                lambda left: [left] * len(self.head.offsets),
                labels,
                any_size=any_size,
                **options,
            )
        if not self.head.offsets:  # in evaluation it takes each frame separately
            return super()._segment(images[:, -1], labels, any_size=any_size, **options)
        self._check_clips(images, labels, any_size)
        frames = images.transpose(0, 1).flatten(0, 1)
        if self.head.takes_size:
            options["size"] = frames.shape[2:]
        return self.head(self.backbone(frames), labels, **self._frames(frames), **options)

    def step(
        self,
        images: Tensor,
        recall: Recall,
        labels: Tensor | None = None,
        *,
        any_size: bool = False,
        **options: Any,
    ) -> SegmentationOutput:
        """One frame of B videos (B, 3, H, W); ``recall`` returns what the frames before left."""
        options |= self._frames(images)
        return super()._segment(images, labels, any_size=any_size, recall=recall, **options)

    def _frames(self, images: Tensor) -> dict[str, Frames]:
        """The frames, if the head takes them."""
        return {"frames": Frames(images, self.normalisation)} if self.head.takes_frames else {}

    @property
    def history(self) -> int:
        """h, the number of past frames in a clip that it is trained on."""
        return self.head.history

    @property
    def reach(self) -> int:
        """How many frames back the earliest frame is that changes the prediction."""
        return max(self.head.offsets, default=0)

    def pixel_representations(self, images: Tensor) -> Tensor:
        """R of the last frames: (B, h + 1, 3, H, W) or (B, 3, H, W) -> (B, Z, h, w)."""
        return super().pixel_representations(images[:, -1] if images.ndim == 5 else images)

    def _check_clips(self, images: Tensor, labels: Tensor | None, any_size: bool) -> None:
        frames = len(self.head.offsets) + 1
        if images.ndim != 5 or images.shape[1] != frames or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point clips (B, {frames}, 3, H, W) for history="
                f"{frames - 1}, got {images.dtype} {tuple(images.shape)}; the data must have the "
                "same history as the model"
            )
        expected = (len(images), *images.shape[3:])
        if labels is not None and any_size and labels.ndim == 3:
            expected = (len(images), *labels.shape[1:])
        if labels is not None and labels.shape != expected:
            raise ValueError(
                f"labels: expected {expected} to go with the images, got {tuple(labels.shape)}"
            )


@torch.no_grad()
def load_image_weights(model: VideoSegmentor, checkpoint: str | Path) -> Beginning:
    """Initialises a video model with the weights of an image model with the same options.

    With another number of classes the classifiers and the memory keep their fresh weights.

    The part of the fusing convolution that takes past frames becomes zero: in evaluation the video
    model then computes what the image model does, and training starts from there. What another
    method adds to the image model (:class:`mcibi_fast.models.netwarp.NetWarp`) stays as it is. A
    checkpoint of a video model is loaded as it is.

    Args:
        model: a video model with a memory of the same kind, or none.
        checkpoint: a run's directory or a weights file of this package.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not a checkpoint of this package, or belongs to another architecture.
    """
    file = find_weights(checkpoint)
    spec = read_spec(file)  # a clear error for other files
    state = read_weights(file)
    own = model.state_dict()
    image = state.get(_FUSING)
    if image is not None and image.shape[1] == 2 * (Z := model.memory.channels):
        widened = torch.zeros(own[_FUSING].shape, dtype=image.dtype)
        widened[:, :Z], widened[:, -Z:] = image[:, :Z], image[:, -Z:]
        state[_FUSING] = widened
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if isinstance(model.head, VideoMethod):
        added = tuple(f"head.{name}." for name in model.head.added_modules)
        shapes = {n: tuple(t.shape) for n, t in own.items() if n.startswith(added)} | shapes
    same_classes = len(spec.classes) == max(2, model.head.num_classes)  # one logit is of two
    (check_shapes if same_classes else check_names)(model, shapes, file)
    return take_what_fits(model, state, file, spec.backbone)
