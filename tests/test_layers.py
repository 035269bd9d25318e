"""The layers of the package: which folder may import which, and what importing it loads."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mcibi_fast"

# Bottom to top: each imports those before it alone. CONTRIBUTING.md shows it as the map.
LAYERS = (
    "version.py",
    "_schemas.py",
    "defaults.py",
    "_build.py",
    "files.py",
    "limits.py",
    "allocation.py",
    "interrupt.py",
    "extras.py",
    "errors.py",
    "terminal.py",
    "progress.py",
    "untrusted.py",
    "typed.py",
    "protocols.py",
    "ops/",
    "nn/",
    "__init__.py",
    "metrics/",
    "viz/",
    "models/",
    "data/",
    "recipes/",
    "inference/",
    "training/",
    "compat/",
    "serving/",
    "reports/",
    "ablations/",
    "commands/",
    "cli.py",
)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> str:
    top = FILES[module].relative_to(PACKAGE).parts
    return top[0] if len(top) == 1 else f"{top[0]}/"


def named_modules(node: ast.AST, module: str) -> list[str]:
    """The modules that a statement imports; of ``from a import b``, a.b if there is such a file."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".") + ["__init__"] * (FILES[module].name == "__init__.py")
            base = ".".join([*package[: -node.level], *([base] if base else [])])
        names = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in FILES else base for name in names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [a.value for a in node.args if isinstance(a, ast.Constant)]
    return []


def imports(module: str) -> set[str]:
    """The package's modules that a file imports: anywhere, in functions and for types as well."""
    statements = ast.walk(ast.parse(FILES[module].read_text()))
    names = {name for statement in statements for name in named_modules(statement, module)}
    return (names & FILES.keys()) - {module}


IMPORTS = {module: imports(module) for module in FILES}


def test_imports_are_found() -> None:
    """Plain ones, one for types, one within a function, one by name."""
    assert {"mcibi_fast.data.base", "mcibi_fast.data.images"} <= IMPORTS["mcibi_fast.data.folder"]
    assert "mcibi_fast.ops.dispatch" in IMPORTS["mcibi_fast"]
    tree = "def f():\n from . import base\n from ..files import a\n import_module('mcibi_fast.nn')"
    names = [named_modules(n, "mcibi_fast.data.folder") for n in ast.walk(ast.parse(tree))]
    expected = [["mcibi_fast.data.base"], ["mcibi_fast.files"], ["mcibi_fast.nn"]]
    assert [name for name in names if name] == expected


def test_no_file_imports_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}", pytrace=False)


def test_no_layer_imports_one_above_it() -> None:
    upwards = [
        f"{module} imports {other}: {layer(other)} is above {layer(module)}"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if LAYERS.index(layer(other)) > LAYERS.index(layer(module))
    ]
    assert not upwards, "\n".join(upwards)


def test_every_file_has_a_layer() -> None:
    assert {layer(module) for module in FILES} == set(LAYERS)
    assert len(set(LAYERS)) == len(LAYERS)


def test_contributing_shows_the_layers() -> None:
    _, found, rest = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map of the house\n")
    assert found
    table = rest.partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == LAYERS


def test_the_front_door_imports_little() -> None:
    """Nothing but torch and NumPy, and not even them before an attribute asks for them."""
    heavy = ("timm", "torchvision", "PIL", "triton", "accelerate", "matplotlib", "safetensors")
    code = (
        "import sys, mcibi_fast; assert 'torch' not in sys.modules; "
        "mcibi_fast.ops, mcibi_fast.nn, mcibi_fast.explain; assert 'torch' in sys.modules; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
