"""What is measured on a trained model in addition to the last evaluation of its training.

Each function takes a trained run and returns scores by part; a row says which part it shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcibi_fast.ablations.runs import TrainedRun, percent
from mcibi_fast.ablations.stages import STAGES, StageWeights, fastest, trade_off
from mcibi_fast.ablations.table import Scores
from mcibi_fast.models import SegmentationOutput, Segmentor, SegmentorWrapper
from mcibi_fast.recipes import NamedData
from mcibi_fast.training.adversarial import fgsm

TENTH = 10  # class 10 is jumpsuits in LIP and torso skin in CIHP


def two_stages(run: TrainedRun) -> dict[str, Scores]:
    """Scores with one more stage of inference: O_{s_2} of section 3.5."""
    confusion = run.evaluate(run.model(), run.validation(), stages=2)
    return {"inference.stages=2": percent(confusion.compute())}


def four_stages(run: TrainedRun) -> dict[str, Scores]:
    """For one to four stages: scores of O, scores of the weights W of that stage, and the time."""
    model, dataset = run.model(), run.validation()
    image = dataset[0]["image"][None].to(run.device())
    times = [1e3 * seconds for seconds in fastest(model, image)]
    parts: dict[str, Scores] = {}
    for stage, milliseconds in zip(STAGES, times, strict=True):
        weights = percent(run.evaluate(StageWeights(model, stage), dataset, stages=None).compute())
        parts[f"inference.stages={stage}"] = {
            **percent(run.evaluate(model, dataset, stages=stage).compute()),
            "ms": milliseconds,
            **{f"W_{name}": value for name, value in weights.items()},
        }
    gains = trade_off([part["mIoU"] for part in parts.values()], times)
    for part, gain in zip(parts.values(), gains, strict=True):
        if gain is not None:
            part["trade_off"] = gain
    return parts


def by_ground_truth(run: TrainedRun) -> dict[str, Scores]:
    """A model that was trained with its own W, tested with the ground truth as W (Table 1)."""
    model = run.model(weights_from="labels")
    return {
        "model.options.weights_from=labels": percent(
            run.evaluate(model, run.validation()).compute()
        )
    }


def lip_and_cihp(run: TrainedRun) -> dict[str, Scores]:
    """Scores on the validation splits of LIP and CIHP, both at LIP's test size."""
    data = run.config.data
    assert isinstance(data, NamedData) and run.test_root is not None
    cihp = NamedData("cihp", root=run.test_root, size=data.size)
    model = run.model()
    parts = {}
    for name, dataset in (("LIP", run.validation()), ("CIHP", cihp.dataset("val"))):
        metrics = run.evaluate(model, dataset).compute()
        without = 100 * metrics.without([TENTH]).mean_iou
        parts[f"tested on {name}"] = percent(metrics) | {"mIoU_without_10": without}
    return parts


def under_attack(run: TrainedRun) -> dict[str, Scores]:
    """Scores on the validation split after FGSM changed every image to raise the model's loss."""
    dataset, network = run.validation(), run.model()
    mean, std = network.normalisation or (dataset.mean, dataset.std)
    model = UnderAttack(network, epsilon=run.config.adversarial.epsilon, mean=mean, std=std)
    attacked = percent(run.evaluate(model, dataset, stages=None).compute())
    return {"tested under FGSM, too": {f"attacked_{k}": v for k, v in attacked.items()}}


class UnderAttack(SegmentorWrapper):
    """A model that predicts attacked images.

    Args:
        model: the model that is attacked and then predicts.
        epsilon: see `mcibi_fast.training.adversarial.fgsm`.
        mean, std: normalisation of the images, per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: Segmentor, *, epsilon: float, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(model)
        self.epsilon = epsilon
        device = next(model.parameters()).device
        self.register_buffer("mean", torch.tensor(mean, device=device).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=device).view(3, 1, 1))

    @property
    def needs_labels(self) -> bool:
        """True: the attack needs the labels."""
        return True

    def forward(self, images: Tensor, labels: Tensor) -> SegmentationOutput:
        moved = fgsm(self.model, images, labels, epsilon=self.epsilon, mean=self.mean, std=self.std)
        return self.model(moved, labels)
