"""Exported models: programs and ONNX files that give what the model gives, and what is refused."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from torch import nn

from mcibi_fast import models, ops
from mcibi_fast.inference import export
from mcibi_fast.inference.export import Agreement, EvaluationForm
from mcibi_fast.models.weights import ModelSpec
from tests.models.stub_backbone import NAMES, Stub, stubbed

K, Z = 5, 16
SPEC = ModelSpec(
    name="fcn",
    backbone="stub",
    options={},
    classes=["road", "sky", "tree", "car", "sign"],
    palette=[[k, k, k] for k in range(K)],
    mean=[0.1, 0.2, 0.3],
    std=[0.4, 0.5, 0.6],
)
FIXED = (40, 48)
# Of each framework: stages, folded, image size. "paper" attends on class weights.
CASES = {
    "fcn": (None, True, None),
    "pspnet": (None, True, FIXED),
    "deeplabv3": (None, False, FIXED),
    "upernet": (None, True, FIXED),
    "isnet": (None, False, FIXED),
    "fcn_mcibipp released": (2, True, None),
    "fcn_mcibipp paper": (2, False, FIXED),
    "pspnet_mcibipp released": (2, False, FIXED),
    "pspnet_mcibipp paper": (1, True, None),
    "deeplabv3_mcibipp released": (2, True, FIXED),
    "deeplabv3_mcibipp paper": (None, False, FIXED),
    "upernet_mcibipp released": (None, False, FIXED),
    "upernet_mcibipp paper": (2, True, FIXED),
    "isnet_mcibipp released": (2, True, FIXED),
    "isnet_mcibipp paper": (2, False, FIXED),
    "fcn_mcibi released": (2, True, FIXED),
}
FAST = ("fcn_mcibipp released",)


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    with stubbed(monkeypatch):
        yield


def build(name: str) -> models.Segmentor:
    framework, _, form = name.partition(" ")
    options = {"form": form} if form else {}
    if form or framework == "isnet":
        options["transform_channels"] = 8
    if framework.startswith("deeplabv3"):
        options["dilations"] = (1, 2)
    model = models.create(framework, K, feats_channels=Z, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        if hasattr(model.head, "memory"):
            model.memory.memory.normal_(0.5, 0.5, generator=generator)
        # So that the classes share the pixels.
        logits = model(torch.randn(2, 3, 40, 48, generator=generator)).logits
        model.head.decoder.classifier.bias -= logits.mean((0, 2, 3))
    return model


def expected(model, images, stages):
    options = {} if stages is None else {"stages": stages}
    with torch.no_grad():
        logits = model(images, **options).logits
    return logits, ops.upsample_argmax(logits, tuple(images.shape[2:]))


def batches(size, generator, dtype=torch.float32):
    shapes = [(1, *size), (3, *size)] if size else [(1, 40, 48), (2, 33, 51), (3, 64, 17)]
    return [torch.randn(b, 3, h, w, generator=generator, dtype=dtype) for b, h, w in shapes]


def test_all_frameworks_are_in_the_table():
    # MCIBI's differ from MCIBI++'s in what the memory holds: one of them is enough. Of video models
    # a stream's state would have to be part of the program.
    others = {n for n in NAMES if not n.endswith("_mcibi") and "_video_" not in n}
    assert others | {"fcn_mcibi"} == {name.split()[0] for name in CASES}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES],
)
def test_programs_in_float64(name, generator):
    stages, fold, size = CASES[name]
    model = build(name).double()
    program = export.trace(EvaluationForm(model, stages=stages, fold=fold), size)
    run = export.program_runner(export.program_bytes(program, SPEC))
    for images in batches(size, generator, torch.float64):
        logits, labels = run(images)
        want, classes = expected(model, images, stages)
        assert float((logits - want).abs().max() / want.abs().max()) < 1e-12
        assert torch.equal(labels, classes)
        assert len(labels.unique()) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["pspnet", "fcn_mcibipp released", "fcn_mcibipp paper", "isnet_mcibipp released"],
)
def test_standard_operators(name, generator):
    """The program that ONNX is made of: nothing of this package, no memory, the same outputs."""
    stages, fold, size = CASES[name]
    model = build(name)
    size = size or FIXED
    form = EvaluationForm(model, stages=stages, fold=fold)
    program = export.trace(form, size, standard=True)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [t for t in targets if "mcibi" in t or "rand" in t or "bitwise_xor" in t]
    module = program.module()
    for images in batches(size, generator):
        export.compare(model, module, images, stages=stages).check()


def test_extra_files_of_a_program(tmp_path):
    program = export.trace(EvaluationForm(build("fcn")), FIXED)
    files = {export.METADATA: ""}
    torch.export.load(io.BytesIO(export.program_bytes(program, SPEC)), extra_files=files)
    assert json.loads(files[export.METADATA])["classes"] == SPEC.classes


@pytest.mark.parametrize("fold", [True, False])
def test_other_models_learn_while_an_exported_form_lives(fold):
    """An optimiser's step looks at the memories of all models, and a form has constants instead."""
    form = EvaluationForm(build("fcn_mcibipp released"), fold=fold)
    other = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    before = other.weight.detach().clone()
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(other.weight, before - 1) and not form.training


@pytest.mark.parametrize("name", ["fcn_mcibipp released", "fcn_mcibipp paper"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_table_is_a_constant(name, fold):
    """Training goes on with the memory; what was exported keeps its class representations."""
    model = build(name)
    form = EvaluationForm(model, fold=fold)
    assert not [key for key in form.state_dict() if key.endswith(("memory.memory", "noise_table"))]
    if not fold:
        table = form.model.head.context.memory.table
        assert torch.equal(table, model.memory.representations())


def test_regions_are_those_of_adaptive_pooling(generator):
    maps = torch.randn(2, 3, 7, 11, generator=generator, dtype=torch.float64)
    for counts in ((1, 1), (2, 2), (3, 3), (6, 6), (6, 2), (9, 13)):
        want = nn.functional.adaptive_avg_pool2d(maps, counts)
        torch.testing.assert_close(export._pool(maps, counts), want, rtol=1e-12, atol=1e-12)


def test_stages_need_a_memory():
    with pytest.raises(ValueError, match="no memory to iterate with"):
        EvaluationForm(build("fcn"), stages=2)


def test_sizes_that_cannot_be_any():
    class Fixed(Stub):
        def forward(self, images):
            assert images.shape[2] == 40
            return super().forward(images)

    form = EvaluationForm(models.Segmentor(Fixed(), build("fcn").head))
    with pytest.raises(ValueError, match=r"images of any size .*--size H,W"):
        export.trace(form)
    assert export.trace(form, FIXED)


def test_windows_need_a_size():
    Windows = type("Windows", (Stub,), {"__module__": "somewhere.swin"})
    form = EvaluationForm(models.Segmentor(Windows(), build("fcn").head))
    with pytest.raises(ValueError, match=r"whole windows; .*--size H,W"):
        export.trace(form)


def test_wrong_outputs_are_refused(tmp_path, monkeypatch, generator):
    model = build("fcn")
    images = batches(FIXED, generator)[0]
    logits, labels = expected(model, images, None)
    export.compare(model, lambda _: (logits, labels), images).check()
    for wrong in (logits * (1 + 1e-4), logits + float("nan")):
        with pytest.raises(ValueError, match="logits differ"):
            export.compare(model, lambda _, wrong=wrong: (wrong, labels), images).check()
    with pytest.raises(ValueError, match="pixels have another class"):
        export.compare(model, lambda _: (logits, (labels + 1) % K), images).check()
    monkeypatch.setattr(export, "program_runner", lambda _: lambda x: (logits, (labels + 1) % K))
    with pytest.raises(ValueError, match="not written"):
        export.save(model, SPEC, tmp_path / "model.pt2", size=FIXED)
    assert not list(tmp_path.iterdir())


def test_the_bound_follows_the_own_error():
    agreement = Agreement((1, 3, 8, 8), 3e-6, 1e-6, 64, 0, 0.0)
    agreement.check()
    with pytest.raises(ValueError, match="1x3x8x8 the logits differ by 6"):
        Agreement((1, 3, 8, 8), 6e-6, 1e-6, 64, 0, 0.0).check()


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs onnxscript: pip install "mcibi-fast\[onnx\]"'):
        export.save(build("fcn"), SPEC, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"a \.onnx or a \.pt2 file"):
        export.save(build("fcn"), SPEC, tmp_path / "model.pb")
