"""The head without a memory: a framework as its own paper describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.models.head import SegmentationHead, made
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.decoder import Decoder, auxiliary_decoder
from mcibi_fast.nn.losses import PixelLoss, joint_losses


class PlainHead(SegmentationHead):
    """Classifies what a framework computes from the feature maps.

    An auxiliary head classifies the stage before the last. The classifier follows the framework's
    context directly or, if the framework expands its context (``expand``), with Conv3x3-BN-ReLU in
    between. A ``guided`` framework computes its context from R and a first prediction, from R
    or by the auxiliary head. A
    framework without a context (FCN) has Conv3x3-BN-ReLU on the last stage.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        decoder: a module that classifies ``decoder_input``, instead of the one described above.
            The context within the image then comes before it and is not part of it.
        within_image: the framework's context, a module or a function that makes it.
        within_channels: channels of the output of ``expand``; None if nothing is expanded.
        feats_channels: Z, channels of the pixel representations.
        dropout: channel dropout before each classifier.
        first_weight: weight of ``loss_pr``, the loss of the first prediction; 0.4 if None. Only for
            a guided framework.
        auxiliary_weight: weight of the auxiliary head's loss; 0 leaves the head out.
        ignore_index: label that does not count in the losses.
        align_corners: whether every bilinear resizing aligns corners.
        loss: the loss of every term; plain mean cross entropy by default.

    Raises:
        TypeError: ``first_weight`` was given for a framework without a first prediction.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        decoder: Decoder | None = None,
        within_image: nn.Module | Callable[[], nn.Module] | None = None,
        within_channels: int | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        first_weight: float | None = None,
        auxiliary_weight: float = 0.4,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
        loss: PixelLoss | None = None,
    ) -> None:
        super().__init__()
        if first_weight is not None and not self.guided:
            raise TypeError("first_weight: this framework makes no first prediction")
        K, Z, last = num_classes, feats_channels, in_channels[-1]
        stands_apart = self.guided or within_channels is not None or decoder is not None
        if decoder is not None:
            self.decoder = decoder
        elif self.guided:
            self.decoder = Decoder(Z, Z, K, dropout=dropout, conv=nn.Identity())
        elif within_image is None or within_channels is not None:
            self.decoder = Decoder(within_channels or last, Z, K, kernel_size=3, dropout=dropout)
        else:
            self.decoder = Decoder(last, Z, K, dropout=dropout, conv=made(within_image))
        self.auxiliary = (
            auxiliary_decoder(in_channels, Z, K, dropout=dropout) if auxiliary_weight else None
        )
        self.bottleneck = conv_bn_relu(last, Z, 3) if self.guided else None
        self.by_auxiliary = self.guided_by_auxiliary and self.auxiliary is not None
        self.first_decoder = None
        if self.guided and not self.by_auxiliary:
            self.first_decoder = Decoder(Z, Z, K, dropout=dropout)
        self.within_image = None
        if stands_apart and within_image is not None:
            self.within_image = made(within_image)
        self.num_classes = num_classes
        self.first_weight = 0.4 if first_weight is None else first_weight
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.loss = loss or PixelLoss()

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (B, Z, h, w), the features that are classified."""
        return self.decoder.conv(self.decoder_input(features)[0])

    def decoder_input(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The decoder's input and, for a guided framework, the logits of the first prediction."""
        if self.within_image is None:
            return features[-1], None
        R = first = None
        if self.bottleneck is not None:
            R = self.bottleneck(features[-1])
            first = self._first_prediction(features, R)
        return self.expand(features, self.gather_within_image(features, R, first)), first

    def _first_prediction(self, features: Sequence[Tensor], R: Tensor) -> Tensor:
        if self.first_decoder is not None:
            return self.first_decoder(R)
        assert isinstance(self.auxiliary, Decoder)
        return self.auxiliary(features[-2])

    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], labels: Tensor | None = None
    ) -> SegmentationOutput:
        maps, first = self._run(self.decoder_input, features)
        logits, further = self._run(self.predict, maps, labels is not None)
        losses = {}
        if labels is not None:
            losses = self.losses(features, logits, first, labels)
            losses |= self.further_losses(further, labels)
        return SegmentationOutput(logits, losses)

    def losses(
        self, features: Sequence[Tensor], logits: Tensor, first: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The weighted losses of the prediction, the first prediction and the auxiliary head."""
        return joint_losses(
            logits,
            labels,
            weight_logits=None if self.by_auxiliary else first,
            alpha=self.first_weight,
            auxiliary_logits=first if self.by_auxiliary else self._auxiliary_logits(features),
            auxiliary_weight=self.auxiliary_weight,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            loss=self.loss,
        )

    def predict(self, maps: Tensor, further: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits and, if ``further``, the predictions of further classifiers.

        A framework with more than one classifier returns their predictions by the names of their
        losses.

        Args:
            maps: the result of ``decoder_input``.
            further: whether there are labels, so that they are needed.
        """
        return self.decoder(maps), {}
