"""The recipe for CamVid on a CPU."""

from __future__ import annotations

from mcibi_fast import recipes
from mcibi_fast.recipes.registry import configure


def test_camvid_lite_starts_from_packaged_weights_where_there_are_some() -> None:
    config = recipes.camvid_lite()
    assert config.model.name == "fcn_mcibipp"
    assert config.model.backbone == "tf_efficientnet_lite0"
    assert config.model.options == {"output_stride": 16, "pretrained": "efficientnet_lite0"}
    other = recipes.camvid_lite("deeplabv3", "resnet18", memory=None)
    assert other.model.options == {"output_stride": 16} and other.model.name == "deeplabv3"


def test_camvid_lite_takes_changes_as_every_recipe(tmp_path) -> None:
    config = configure("camvid_lite", str(tmp_path), ["epochs=3"], memory="mcibi")
    assert (config.epochs, config.model.memory) == (3, "mcibi")
    assert config.data.root == str(tmp_path)
