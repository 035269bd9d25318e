"""What works with torch and numpy alone, what each extra adds, and the line that says what to do.

The environments hold links to the packages installed here that the requirements in pyproject.toml
bring, and nothing else, so that nothing is downloaded.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import mcibi_fast
from mcibi_fast import cli, extras
from mcibi_fast.extras import EXTRAS, MissingExtra

PACKAGE = Path(mcibi_fast.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules})
TINY = (
    "--set",
    "model.backbone=test_resnet",
    "model.options.feats_channels=8",
    "epochs=1",
    "batch_size=2",
    "device=cpu",
    "workers=0",
    "augmentation.crop_size=[32,32]",
    "data.train_count=2",
    "data.val_count=2",
    "data.size=[40,48]",
)
SPEC = """
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec
options = {"feats_channels": 8, "transform_channels": 8}
classes, palette = ["a", "b"], [[0, 0, 0], [9, 9, 9]]
spec = ModelSpec("fcn_mcibipp", "test_resnet", options, classes, palette, [0.0] * 3, [1.0] * 3)
model = create_model(spec)
"""


# --- what pyproject.toml says -------------------------------------------------------------------


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The base's and each extra's."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")
    if not PYPROJECT.is_file():
        pytest.skip("needs the source tree (pyproject.toml)")
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return project["dependencies"], project["optional-dependencies"]


def expand(extra: str) -> list[str]:
    """An extra's requirements, those of the extras that it includes among them."""
    found = []
    for text in requirements()[1][extra]:
        included = Requirement(text)
        if included.marker is not None and not included.marker.evaluate():
            continue  # for other versions of Python
        if included.name == "mcibi-fast":
            found += [line for name in sorted(included.extras) for line in expand(name)]
        else:
            found.append(text)
    return found


def test_the_base_is_torch_and_numpy() -> None:
    assert {Requirement(line).name for line in requirements()[0]} == {"torch", "numpy"}


def test_extras_are_those_of_pyproject() -> None:
    assert requirements()[1].keys() - EXTRAS.keys() == {"all", "test", "docs", "dev"}
    for extra, modules in EXTRAS.items():
        expected = {extras.DISTRIBUTIONS.get(module, module) for module in modules}
        assert {Requirement(line).name for line in expand(extra)} == expected
    assert {*expand("all")} == {line for extra in EXTRAS for line in expand(extra)}
    assert {*expand("all")} < {*expand("test")} < {*expand("dev")}


# --- imports ------------------------------------------------------------------------------------


def imports(tree: ast.AST, nested: bool = False) -> Iterator[tuple[str, bool]]:
    """Modules and whether a function imports them; not what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", nested
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imports(node, nested or isinstance(node, ast.FunctionDef))


def required(module: str) -> set[str]:
    """What a module and the packages that hold it require as they are imported."""
    names = module.split(".")
    found: set[str] = set()
    files = [PACKAGE.joinpath(*names[1:n], "__init__.py") for n in range(2, len(names) + 1)]
    for file in (*files, PACKAGE.joinpath(*names[1:]).with_suffix(".py")):
        call = re.search(r"^require\((.*?)\)", file.read_text() if file.is_file() else "", re.M)
        found |= {*ast.literal_eval(f"({call[1]},)")[1:]} if call else set()
    return found


def test_optional_packages_are_required_before_they_are_imported() -> None:
    """Or imported by `extras.load`, so that no import of one fails with a traceback."""
    base = {PACKAGE.name, "torch", "numpy", "triton", *sys.stdlib_module_names}
    seen, unchecked = set(), []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join([PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts])
        found = [*imports(ast.parse(file.read_text()))]
        here = required(module)
        at_top = here.union(*(required(name) for name, nested in found if not nested))
        for name, nested in found:
            package = name.partition(".")[0]
            if package not in base:
                seen.add(package)
                if package not in (at_top if nested else here):
                    unchecked.append(f"{module} imports {name}")
    assert {"timm", "PIL", "accelerate", "matplotlib"} <= seen <= {*OPTIONAL}
    assert unchecked == []


# --- messages -----------------------------------------------------------------------------------


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require("nothing")
    extras.require("something", "PIL", "tqdm")
    for module in ("PIL", "tqdm", "cv2", "timm", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    for modules, line in (
        (["timm", "safetensors"], 'a needs timm: pip install "mcibi-fast[models]"'),
        (["PIL", "timm"], 'a needs pillow, timm: pip install "mcibi-fast[train]"'),
        (["tqdm", "matplotlib"], 'a needs tqdm, matplotlib: pip install "mcibi-fast[report]"'),
        (["cv2"], 'a needs opencv-python-headless: pip install "mcibi-fast[video]"'),
    ):
        with pytest.raises(MissingExtra) as caught:
            extras.require("a", *modules)
        assert str(caught.value) == line and isinstance(caught.value, ImportError)
    with pytest.raises(MissingExtra, match=r'a needs tqdm: pip install "mcibi-fast\[train\]"'):
        extras.load("a", "tqdm.auto")


def test_a_broken_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "webdataset.py").write_text("raise OSError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "webdataset", raising=False)
    with pytest.raises(MissingExtra, match=r"a needs webdataset, which .*\(no such symbol\)"):
        extras.load("a", "webdataset")


def test_the_command_line_says_so(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = ["--out", str(tmp_path / "out")]
    line = 'mcibi-fast demo needs matplotlib: pip install "mcibi-fast[report]"'
    assert fails("demo", *out) == f"mcibi-fast: error: {line}\n"
    assert list(tmp_path.iterdir()) == []


# --- environments -------------------------------------------------------------------------------

Run = Callable[..., subprocess.CompletedProcess[str]]


def distributions(roots: list[str]) -> dict[str, metadata.Distribution]:
    """What is installed here of these requirements and theirs, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    todo, done = [Requirement(root) for root in roots], set()
    while todo:
        wanted = todo.pop()
        if str(wanted) in done:
            continue
        done.add(str(wanted))
        try:
            installed = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs {wanted} installed")
        found[re.sub(r"[-_.]+", "-", wanted.name).lower()] = installed
        for text in installed.requires or []:
            needed = Requirement(text)
            asked = [{"extra": extra} for extra in ("", *wanted.extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, asked)):
                todo.append(needed)
    return found


def environment(folder: Path, roots: list[str]) -> Run:
    """A new virtual environment with the package and these requirements; runs its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / PACKAGE.name).symlink_to(PACKAGE)
    for installed in distributions(roots).values():
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            target, link = Path(str(installed.locate_file(top))), site / top
            if target.exists() and not link.exists():
                link.symlink_to(target)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / "python"), "-I", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def command(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``mcibi-fast`` in that environment, which must succeed."""
    done = run("-m", "mcibi_fast.cli", *arguments)
    assert done.returncode == 0, done.stderr
    return done


def script(run: Run, code: str) -> str:
    """What a program prints there."""
    done = run("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_torch() -> set[str]:
    """Optional modules that torch brings for itself."""
    brought = distributions(requirements()[0])
    found = {name for name in OPTIONAL if extras.DISTRIBUTIONS.get(name, name) in brought}
    assert found <= {"filelock", "jinja2"}
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return environment(tmp_path_factory.mktemp("base") / "venv", requirements()[0])


def test_base(base: Run) -> None:
    """The ops, the modules and the metrics, on torch and numpy."""
    code = f"""
        import importlib.util
        import mcibi_fast
        assert mcibi_fast.__file__.endswith("site-packages/mcibi_fast/__init__.py")
        import torch
        from mcibi_fast import metrics, nn, ops
        import mcibi_fast.compat.accelerate
        from mcibi_fast.compat import mmseg, smp, torchvision, transformers

        memory = nn.GaussianMemory(num_classes=3, channels=8)
        context = nn.DatasetLevelContext(memory, transform_channels=8)
        features = torch.randn(1, 8, 6, 7, requires_grad=True)
        labels = torch.randint(0, 3, (1, 24, 28))
        augmented, logits = context(features)
        mcibi_fast.upsample_cross_entropy(logits, labels).backward()
        memory.update(features.detach(), labels)
        confusion = metrics.ConfusionMatrix(3)
        confusion.update(mcibi_fast.upsample_argmax(logits, (24, 28)), labels)
        assert features.grad.norm() > 0 and confusion.compute().mean_iou is not None
        print([name for name in {OPTIONAL} if importlib.util.find_spec(name)])
    """
    assert script(base, code) == f"{sorted(of_torch())}\n"


@pytest.mark.parametrize(
    ("module", "packages", "extra"),
    [
        ("models", "timm, safetensors, huggingface_hub", "models"),
        ("models.hub", "timm, safetensors, huggingface_hub", "models"),
        ("compat.sssegmentation", "timm, safetensors, huggingface_hub", "models"),
        ("data", "pillow, tqdm", "train"),
        ("training", "accelerate, tensorboard, tqdm", "train"),
        ("inference", "pillow, tqdm", "train"),
        ("viz", "pillow", "train"),
        ("reports", "pillow, matplotlib, scikit-learn, tqdm", "report"),
    ],
)
def test_a_missing_extra_in_python(base: Run, module: str, packages: str, extra: str) -> None:
    owner = {"models.hub": "models", "compat.sssegmentation": "models"}
    code = f"""
        try:
            import mcibi_fast.{module}
        except ImportError as error:
            print(error)
    """
    name = f"mcibi_fast.{owner.get(module, module)}"
    assert script(base, code) == f'{name} needs {packages}: pip install "mcibi-fast[{extra}]"\n'


@pytest.mark.slow
def test_commands_without_extras(base: Run) -> None:
    required = {
        "train": ["demo"],
        "evaluate": ["x"],
        "predict": ["x", "y"],
        "video": ["x", "y"],
        "report": ["x"],
        "serve": ["x"],
        "convert": ["x", "y"],
        "export": ["x", "y"],
        "data": ["check", "x"],
        "demo": [],
        "ablate": ["2"],
        "bench": ["--help"],
        "models": [],
        "info": [],
    }
    assert required.keys() == cli.COMMANDS.keys()
    for name, arguments in required.items():
        done = base("-m", "mcibi_fast.cli", name, *arguments)
        extra = cli.COMMANDS[name].EXTRA
        if not extra:
            assert (done.returncode, done.stderr) == (0, "") and done.stdout
            continue
        packages = [name for name in EXTRAS[extra] if name not in of_torch()]
        names = ", ".join(extras.DISTRIBUTIONS.get(name, name) for name in packages)
        line = f'mcibi-fast {name} needs {names}: pip install "mcibi-fast[{extra}]"'
        assert (done.returncode, done.stderr) == (2, f"mcibi-fast: error: {line}\n")


@pytest.fixture
def with_extra(tmp_path: Path) -> Callable[[str], Run]:
    """An environment with one extra."""
    return lambda extra: environment(tmp_path / "venv", requirements()[0] + expand(extra))


@pytest.mark.slow
def test_models(with_extra: Callable[[str], Run]) -> None:
    code = """
        from mcibi_fast.models import hub
        import torch, mcibi_fast.compat.sssegmentation
        hub.save_pretrained(model, spec, "saved")
        again, same = hub.from_pretrained("saved")
        images = torch.rand(1, 3, 32, 32)
        assert same == spec
        assert torch.equal(again(images).logits, model.eval()(images).logits)
    """
    script(with_extra("models"), SPEC + textwrap.dedent(code))


@pytest.mark.slow
def test_train(with_extra: Callable[[str], Run], tmp_path: Path) -> None:
    run = with_extra("train")
    done = command(run, "train", "scenes", "--out", "run", "--quiet", *TINY)
    line = 'mcibi_fast.reports needs matplotlib: pip install "mcibi-fast[report]"'
    assert done.stderr == f"mcibi-fast: warning: run/report.html not written: {line}\n"
    assert "mIoU (present)" in command(run, "evaluate", "run", "--cpu", "--quiet").stdout
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "venv" / "image.png")
    command(run, "predict", "run", "image.png", "--cpu", "--quiet")
    code = """
        import torch
        from mcibi_fast.data import MovingScenes, TrainTransform
        from mcibi_fast.nn.clustering import spherical_centres
        MovingScenes("train", count=1, size=(32, 40), length=3, seed=0)[0]
        TrainTransform(32, mean=(0, 0, 0), std=(1, 1, 1))
        spherical_centres(torch.randn(20, 4), 3)
    """
    script(run, code)


@pytest.mark.slow
def test_report(with_extra: Callable[[str], Run]) -> None:
    done = command(with_extra("report"), "demo", "--quiet", *TINY)
    assert "report: " in done.stdout and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "code"),
    [
        (
            "streaming",
            'pack(Scenes("train", count=2, size=32, seed=0), "out", "train", progress=False)',
        ),
        ("video", "metrics.DISFlow()(*torch.zeros(2, 3, 40, 48, dtype=torch.uint8))"),
        ("onnx", 'export.save(model, spec, Path("model.onnx"), size=(32, 32))'),
    ],
)
def test_other_extras(with_extra: Callable[[str], Run], extra: str, code: str) -> None:
    imports = """
from pathlib import Path
import torch
from mcibi_fast import metrics
from mcibi_fast.data import Scenes, pack
from mcibi_fast.inference import export
"""
    script(with_extra(extra), imports + SPEC + code)
