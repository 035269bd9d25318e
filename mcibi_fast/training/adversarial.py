"""Adversarial examples as training images (section 6 of the paper suggests them): FGSM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mcibi_fast.data.loading import seeded_generator
from mcibi_fast.nn.transient import states
from mcibi_fast.recipes.parts import AdversarialConfig

if TYPE_CHECKING:
    from mcibi_fast.data import SegmentationDataset


class Adversary:
    """Replaces the images of some steps by ones that raise the model's loss.

    The choice of steps depends only on (seed, step), so all ranks and a resumed run agree.

    Args:
        config: the size and the probability of the attack.
        dataset: the dataset, with whose ``mean`` and ``std`` the images were normalised.
        seed: seed of the choice of steps.
        device: device of the images.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        dataset: SegmentationDataset,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.seed = config, seed
        self.mean = torch.tensor(dataset.mean, dtype=torch.float32).view(3, 1, 1).to(device)
        self.std = torch.tensor(dataset.std, dtype=torch.float32).view(3, 1, 1).to(device)

    def attacks(self, step: int) -> bool:
        """Whether this step's images are attacked."""
        generator = seeded_generator(self.seed, step, 2)
        return float(torch.rand((), generator=generator)) < self.config.probability

    def attack(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images moved by ``epsilon``, see :func:`fgsm`."""
        return fgsm(
            model, images, labels, epsilon=self.config.epsilon, mean=self.mean, std=self.std
        )


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Fast gradient sign method (arXiv 1412.6572): ``images + epsilon * sign(d loss / d images)``.

    It takes one more forward and backward pass, in which only the images get gradients. The model
    runs in its present mode, so in training mode with batch statistics and dropout, but its buffers
    (the memory, the running statistics of the batch norms) are restored afterwards.

    Args:
        model: without its DistributedDataParallel wrapper; gives losses.
        images: (B, 3, H, W), normalised.
        labels: (B, H, W).
        epsilon: largest change of a colour in 0..255.
        mean, std: of the normalisation, (3, 1, 1), for colours in 0..1; the results stay colours.

    Returns:
        Images in the dtype of ``images``, without a gradient.
    """
    probe = images.detach().requires_grad_()
    with _buffers_kept(model), torch.enable_grad():
        losses = model(probe, labels).losses
        # The sum over pixels where the loss is a mean: float16 gradients would underflow.
        loss = torch.stack(list(losses.values())).sum() * labels.numel()
        (gradient,) = torch.autograd.grad(loss, probe)
    moved = images + (epsilon / 255) / std * gradient.sign().nan_to_num(0.0)
    return moved.clamp(-mean / std, (1 - mean) / std).to(images.dtype)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [buffer.clone() for buffer in states(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(states(model), before, strict=True):
                buffer.copy_(value)
