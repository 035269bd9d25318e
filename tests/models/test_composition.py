"""Any framework, with any memory or none, of images or videos: one declaration each."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.models import registry
from mcibi_fast.recipes import ModelConfig, TrainConfig, apply_settings
from mcibi_fast.recipes.registry import configure
from tests.models.stub_backbone import FRAMEWORKS

K = 4
TINY = {"backbone": "test_resnet", "feats_channels": 8}
TINY_MEMORY = TINY | {"transform_channels": 8}


@pytest.fixture
def own_framework(monkeypatch: pytest.MonkeyPatch) -> str:
    """What someone writes who adds a framework: a class, and nothing else."""
    monkeypatch.setattr(registry, "_FRAMEWORKS", dict(registry._FRAMEWORKS))

    @models.framework("own", "Own")
    class Own(models.SegmentationHead):
        def __init__(self, num_classes, in_channels, *, feats_channels=512, **options):
            context = partial(nn.Conv2d, in_channels[-1], feats_channels, 1)
            super().__init__(
                num_classes,
                in_channels,
                within_image=context,
                feats_channels=feats_channels,
                **options,
            )

    return "own"


def test_a_framework_of_ones_own_has_everything(own_framework: str) -> None:
    images = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(K, (2, 33, 40), generator=torch.Generator().manual_seed(0))
    assert {
        *("own", "own_mcibi", "own_mcibipp", "own_video_mcibi", "own_video_mcibipp"),
        *("own_etc", "own_etc_mcibi", "own_etc_mcibipp"),
    } == {name for name in models.names() if name.startswith("own")}
    for memory in (None, *models.memories()):
        options = TINY if memory is None else TINY_MEMORY
        model = models.create(own_framework, K, memory=memory, **options)
        losses = model.train()(images, labels).losses
        assert {"loss_cls", "loss_aux"} <= losses.keys()
        assert ("loss_pr" in losses) == (memory is not None)
        assert all(loss.isfinite() for loss in losses.values())
        if memory is None:
            continue
        model.eval()
        with torch.no_grad():
            logits = model(images, stages=2).logits
            torch.testing.assert_close(model.fold()(images, stages=2).logits, logits)
        video = models.create(own_framework, K, memory=memory, history=1, **TINY_MEMORY).eval()
        assert isinstance(video, models.VideoSegmentor) and video.history == 1
        with torch.no_grad():
            assert video(torch.stack([images, images], 1)).logits.isfinite().all()
    config = TrainConfig(model=ModelConfig(own_framework))
    apply_settings(config, ["model.memory=mcibi"])
    config.validate()
    assert config.model.name == "own_mcibi"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_word_and_arguments_make_the_same(framework: str) -> None:
    for memory in (None, *models.memories()):
        options = TINY if memory is None else TINY_MEMORY
        for history in (0, 2) if memory else (0,):
            name = registry.ModelKind(framework, memory, history).name
            word = models.create(name, K, **options)
            made = models.create(framework, K, memory=memory, history=history, **options)
            alias = getattr(models, name)(K, **options)
            assert type(word.head) is type(made.head) is type(alias.head)
            assert [(n, t.shape) for n, t in word.state_dict().items()] == [
                (n, t.shape) for n, t in made.state_dict().items()
            ]
            assert isinstance(word.head, getattr(registry._FRAMEWORKS[framework], "cls"))  # noqa: B009
            assert word.head.has_memory == (memory is not None) and word.head.history == history
            assert getattr(models, type(word.head).__name__) is type(word.head)
            if not history:
                assert models.head_type(framework, memory) is type(word.head)


@pytest.mark.slow
def test_heads_can_be_pickled(tmp_path: Path) -> None:
    """In another process too, where nothing has made their classes yet."""
    heads = [
        models.create("upernet", K, **TINY).head,
        models.create("isnet", K, memory="mcibi", history=1, **TINY_MEMORY).head,
    ]
    file = tmp_path / "heads.pickle"
    file.write_bytes(pickle.dumps(heads))
    code = (
        "import pickle, sys; heads = pickle.load(open(sys.argv[1], 'rb')); "
        "print(*(type(head).__name__ for head in heads))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["UperNetHead", "ISNetVideoMCIBIHead"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"framework": "fnc"},
            "no model 'fnc'; there are annnet, .*fcn, .*fcn_video_mcibipp",
        ),
        ({"framework": "fcn_mcibippp"}, "no model 'fcn_mcibippp'"),
        ({"framework": "fcn_mcibi_video"}, "no model"),
        ({"framework": "fcn_video"}, "only with a memory"),
        (
            {"framework": "fcn", "memory": "mcibi++"},
            "no memory 'mcibi\\+\\+'; there are mcibi, mcibipp",
        ),
        ({"framework": "fcn_mcibi", "memory": "mcibipp"}, "'fcn_mcibi' has 'mcibi', not"),
        ({"framework": "fcn", "history": 2}, "history: .* only with a memory"),
        ({"framework": "fcn", "memory": "mcibi", "history": -1}, "history: expected at least 0"),
        ({"framework": "fcn_video_mcibi", "history": 0}, "history: expected at least 1"),
        (
            {"framework": "fcn_tcb"},
            "method: tcb cannot be combined with fcn; it can be with ocrnet",
        ),
        ({"framework": "pspnet_tcb_mcibi"}, "memory: tcb cannot be combined with a memory"),
        ({"framework": "maskformer_etc_mcibi"}, "memory: maskformer cannot be combined"),
        ({"framework": "pspnet", "method": "dff"}, "no method 'dff' for videos; there are etc, "),
        ({"framework": "pspnet_etc", "method": "tcb"}, "'pspnet_etc' has 'etc', not 'tcb'"),
        ({"framework": "pspnet_etc", "history": 0}, "history: expected at least 1"),
        ({"framework": "pspnet_etc", "history": 2}, "history: ETC is trained on pairs"),
        ({"framework": "pspnet_netwarp", "history": 2}, "history: NetWarp takes the frame before"),
        ({"framework": "pspnet_tcb", "gap": 0}, "gap: expected at least 1"),
        ({"framework": "pspnet_tcb", "within_image": nn.Identity()}, "within_image: TCB blends"),
    ],
    ids=str,
)
def test_what_makes_no_model(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create(num_classes=K, **arguments, **TINY)


def test_options_of_other_models_are_refused() -> None:
    for framework, options in (
        ("fcn", {"transform_channels": 8}),
        ("fcn", {"first_weight": 0.4}),
        ("upernet", {"memory_joins": "after"}),
        ("pspnet", {"dilations": (1, 2)}),
        ("isnet", {"stages": 2}),
    ):
        with pytest.raises(TypeError):
            models.create(framework, K, **TINY, **options)
    with pytest.raises(TypeError, match=r"memory_joins: only UperNet with MCIBI\+\+ has"):
        models.create("upernet", K, memory="mcibi", memory_joins="after", **TINY_MEMORY)


def test_recipes_and_settings(tmp_path: Path) -> None:
    """``--framework``, ``--memory`` and ``--set model....``, in either order."""

    def name(recipe: str, *settings: str, **model: str | None) -> str:
        root = None if recipe == "demo" else str(tmp_path)
        return configure(recipe, root, [*settings], **model).model.name

    assert name("demo") == "fcn_mcibipp"
    assert name("demo", "model.memory=mcibi") == "fcn_mcibi"
    assert name("demo", "model.memory=null") == "fcn"
    assert name("demo", "model.framework=upernet") == "upernet_mcibipp"
    assert name("demo", "model.history=2") == "fcn_video_mcibipp"
    assert name("demo", "model.name=pspnet") == "pspnet"  # a word says what memory there is
    assert name("demo", "model.name=upernet_video_mcibi") == "upernet_video_mcibi"
    assert name("demo", "model.name=ocrnet_netwarp") == "ocrnet_netwarp"
    by_field = ("model.framework=pspnet", "model.method=etc", "model.memory=null")
    assert name("demo", *by_field) == "pspnet_etc"
    assert name("camvid", framework="isnet", memory="mcibi") == "isnet_mcibi"
    assert name("camvid", framework="isnet", memory=None) == "isnet"
    assert name("camvid", "model.memory=mcibipp", memory=None) == "fcn_mcibipp"
    for wrong, message in (
        ("model.memory=mcibipp2", "model.memory: no memory 'mcibipp2'"),
        ("model.framework=fnc", "model.name: no model 'fnc'"),
        ("model.name=fnc_mcibi", "no model 'fnc_mcibi'"),
    ):
        with pytest.raises(ValueError, match=message):
            name("demo", wrong)
