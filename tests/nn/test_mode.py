"""A model's mode for the time of a block: afterwards each module has its own again."""

from __future__ import annotations

import pytest
from torch import nn

from mcibi_fast import models
from mcibi_fast.ablations.stages import StageWeights
from mcibi_fast.nn.mode import in_mode


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.fixture
def model() -> models.Segmentor:
    return models.create(
        "fcn_mcibipp", 3, "test_resnet", feats_channels=8, transform_channels=8
    ).train()


@pytest.mark.parametrize("training", [True, False])
def test_parts_keep_the_mode_that_they_had(model: models.Segmentor, training: bool) -> None:
    model.backbone.eval()  # frozen batch norms
    before = modes(model)
    assert set(before.values()) == {True, False}
    with in_mode(model, training=training):
        assert set(modes(model).values()) == {training}
    assert modes(model) == before
    with pytest.raises(KeyError), in_mode(model, training=training):
        raise KeyError
    assert modes(model) == before


def test_a_wrapper_has_the_mode_of_its_model(model: models.Segmentor) -> None:
    """Also of one that cannot be trained any more."""
    assert StageWeights(model, 1).training
    for finished in (model.eval(), model.fold()):
        wrapper = StageWeights(finished, 1)
        before = modes(wrapper)
        with in_mode(wrapper, training=False):
            pass
        assert modes(wrapper) == before and not any(before.values())
