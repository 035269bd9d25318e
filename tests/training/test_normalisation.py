"""Images are normalised as the backbone's weights expect, wherever a model sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from mcibi_fast import cli, models
from mcibi_fast.commands.export import read_image
from mcibi_fast.data import IMAGENET_MEAN, IMAGENET_STD, ClipDataset, MovingScenes, Scenes
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.evaluate_video import evaluate_videos
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import read_spec
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.reports.gathering import model_input
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from mcibi_fast.training.trainer import Trainer
from tests.tiny_run import make_tiny_config

HALF = (0.5, 0.5, 0.5)
MakeConfig = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a backbone whose images timm normalises by 0.5 and 0.5."""
    file = tmp_path_factory.mktemp("timm") / "test_resnet.safetensors"
    with torch.random.fork_rng(devices=[]):
        safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), file)
    return file


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    lines: list[str] = []
    with torch.random.fork_rng(devices=[]):
        seed_global_generators(0)
        config = make_tiny_config(f"model.options.pretrained={weights}", "epochs=1")
        train(config, out, progress=False, report=lines.append)
    assert lines[0] == (
        "images are normalised by mean 0.5, 0.5, 0.5, deviation 0.5, 0.5, 0.5 "
        "(the pretrained weights of test_resnet)"
    )
    return out


def pixels(index: int, split: str = "val") -> torch.Tensor:
    image, _ = make_tiny_config().data.dataset(split).read(index)
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [
        ("resnet50", IMAGENET_MEAN, IMAGENET_STD),
        ("vit_base_patch16_224", HALF, HALF),
        ("beit_base_patch16_224", HALF, HALF),
        ("tf_efficientnet_b0", IMAGENET_MEAN, IMAGENET_STD),
        ("tf_efficientnet_lite0", HALF, HALF),
        ("mobilevit_s", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_what_timm_says(backbone: str, mean: tuple, std: tuple) -> None:
    config = timm.get_pretrained_cfg(backbone)
    assert (config.mean, config.std) == (mean, std)
    for pretrained in (True, "backbone.safetensors"):
        assert models.normalisation(backbone, pretrained) == (mean, std)
    assert models.normalisation(backbone, False) is None


def test_a_model_knows_it(weights: Path) -> None:
    model = models.create("fcn_mcibipp", 3, "test_resnet", pretrained=weights, feats_channels=8)
    assert model.normalisation == (HALF, HALF)
    assert model.eval().fold().normalisation == (HALF, HALF)
    assert models.create("fcn", 3, "test_resnet", feats_channels=8).normalisation is None


def test_the_checkpoint_has_the_weights_normalisation(pretrained_run: Path) -> None:
    model, spec = load_model(pretrained_run)
    assert (tuple(spec.mean), tuple(spec.std)) == (HALF, HALF)
    assert tuple(map(tuple, model.normalisation)) == (HALF, HALF)


def test_training_evaluation_and_attacks_use_it(weights: Path, tmp_path: Path) -> None:
    config = make_tiny_config(f"model.options.pretrained={weights}")
    trainer = Trainer(config, Run(tmp_path), report=lambda line: None)
    assert torch.equal(trainer.val_data[0]["image"], (pixels(0) - 0.5) / 0.5)
    assert (trainer.train_data.transform.mean, trainer.train_data.transform.std) == (HALF, HALF)
    assert trainer.adversary.mean.flatten().tolist() == list(HALF)
    trainer.close()


def test_fresh_weights_keep_the_datasets(tmp_path: Path) -> None:
    trainer = Trainer(make_tiny_config(), Run(tmp_path), report=lambda line: pytest.fail(line))
    assert tuple(trainer.spec.mean) == Scenes.mean and tuple(trainer.spec.std) == Scenes.std
    trainer.close()


def test_settings_override_it(weights: Path, tmp_path: Path) -> None:
    settings = [f"model.options.pretrained={weights}", "data.mean=[0,0.25,1]"]
    lines: list[str] = []
    trainer = Trainer(make_tiny_config(*settings), Run(tmp_path), report=lines.append)
    assert trainer.spec.mean == [0, 0.25, 1] and trainer.spec.std == list(HALF)
    assert torch.equal(trainer.val_data[0]["image"][1], (pixels(0)[1] - 0.25) / 0.5)
    assert lines == [
        "images are normalised by mean 0, 0.25, 1, deviation 0.5, 0.5, 0.5 (data.mean and data.std)"
    ]
    trainer.close()
    config = make_tiny_config(*settings, "data.std=[0.5,0,0.5]")
    with pytest.raises(ValueError, match=r"data\.std: expected three positive numbers, got 0"):
        config.validate()


def test_a_run_goes_on_with_its_own(pretrained_run: Path, weights: Path, tmp_path: Path) -> None:
    seed_global_generators(0)
    train(make_tiny_config("epochs=1"), tmp_path, progress=False, report=lambda line: None)
    # An earlier version trained pretrained weights with the dataset's numbers.
    stored = Run(tmp_path).config()
    stored["model"]["options"]["pretrained"] = str(weights)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for run, mean in ((tmp_path, Scenes.mean), (pretrained_run, HALF)):
        lines: list[str] = []
        trainer = Trainer(Run(run).settings(), Run(run), resume=True, report=lines.append)
        assert tuple(trainer.spec.mean) == tuple(trainer.train_data.mean) == mean
        assert [line.endswith("(the checkpoint)") for line in lines] == [True] * (mean is HALF)
        trainer.close()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The images that any model is called with."""
    images: list[torch.Tensor] = []
    forward = models.Segmentor.forward

    def recorded(self: models.Segmentor, batch: torch.Tensor, *args: Any, **options: Any) -> Any:
        images.extend(batch)
        return forward(self, batch, *args, **options)

    monkeypatch.setattr(models.Segmentor, "forward", recorded)
    return images


def test_evaluation_of_a_checkpoint_on_any_dataset(
    pretrained_run: Path, seen: list[torch.Tensor]
) -> None:
    model, _ = load_model(pretrained_run)
    dataset = make_tiny_config().data.dataset("val")
    evaluate(model, dataset, batch_size=2)
    assert dataset.mean == Scenes.mean  # untouched
    model.normalisation = None
    evaluate(model, dataset, batch_size=2)
    assert len(seen) == 10
    for i in range(5):
        assert torch.equal(seen[i], (pixels(i) - 0.5) / 0.5)
        assert torch.equal(seen[5 + i], dataset[i]["image"])


def test_videos_are_evaluated_by_it(pretrained_run: Path, seen: list[torch.Tensor]) -> None:
    model, _ = load_model(pretrained_run)
    source = MovingScenes("val", count=1, length=2, size=(40, 44), seed=0)
    clips = ClipDataset(source, history=1)
    for videos in (source, clips):
        evaluate_videos(model, videos, windows=())
    frames = [torch.from_numpy(source.read_frame(0, f)[0]).permute(2, 0, 1) for f in range(2)]
    for image, frame in zip(seen, [*frames, *frames], strict=True):
        assert torch.equal(image, (frame / 255 - 0.5) / 0.5)


def test_reports_give_each_model_its_own(pretrained_run: Path) -> None:
    model, _ = load_model(pretrained_run)
    dataset = make_tiny_config().data.dataset("val")
    assert torch.equal(model_input(model, dataset, 1)[0], (pixels(1) - 0.5) / 0.5)
    model.normalisation = None
    assert torch.equal(model_input(model, dataset, 1)[0], dataset[1]["image"])


def test_a_video_model_goes_on_with_the_image_models(pretrained_run: Path) -> None:
    assert models.normalisation("test_resnet", pretrained_run) == ([*HALF], [*HALF])
    options = {"feats_channels": 8, "transform_channels": 8, "form": "paper"}
    spec = read_spec(pretrained_run / "checkpoints" / "last" / "model.safetensors")
    video = models.create(
        "fcn_video_mcibipp", len(spec.classes), "test_resnet", pretrained=pretrained_run, **options
    )
    assert video.normalisation == (spec.mean, spec.std)


@pytest.mark.parametrize("command", ["evaluate", "predict", "video"])
def test_commands_use_it(
    pretrained_run: Path, tmp_path: Path, seen: list[torch.Tensor], command: str
) -> None:
    picture = tmp_path / "in" / "a.png"
    picture.parent.mkdir()
    Image.fromarray(make_tiny_config().data.dataset("val").read(0)[0]).save(picture)
    run, out = str(pretrained_run), str(tmp_path / "out")
    arguments = {
        "evaluate": [run, "--cpu", "--quiet", "--workers", "0"],
        "predict": [run, str(picture), "--out", out, "--cpu", "--quiet"],
        "video": [run, str(picture.parent), "--out", out, "--no-overlay", "--cpu", "--quiet"],
    }
    assert cli.main([command, *arguments[command]]) == 0
    assert torch.equal(seen[0], (pixels(0) - 0.5) / 0.5)


def test_export_says_it_and_checks_by_it(pretrained_run: Path, tmp_path: Path) -> None:
    _, spec = load_model(pretrained_run)  # the file's metadata are all of it
    Image.fromarray(make_tiny_config().data.dataset("val").read(0)[0]).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", spec, None)
    assert torch.equal(image[0], (pixels(0) - 0.5) / 0.5)
