"""README and the site: links lead somewhere, code runs, commands exist, the site builds alone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.extras import EXTRAS
from tests.docs.pages import ROOT, anchors, blocks, commands, links, pages, prose

if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree (docs/)", allow_module_level=True)

README = ROOT / "README.md"
FIRST_STEPS = ROOT / "docs" / "first-steps.md"
START = [README, ROOT / "docs" / "install.md", FIRST_STEPS]
# Pages whose Python blocks run one after the other, and the packages that they need.
RUN_ALONE = {
    "README.md": ["transformers"],
    "docs/drop-in.md": ["torchvision", "transformers", "segmentation_models_pytorch"],
    "docs/hugging-face.md": ["transformers", "accelerate", "timm"],
    "docs/memory-in-your-model.md": ["transformers", "segmentation_models_pytorch"],
    "docs/models.md": ["timm"],
    "docs/operators.md": [],
    "docs/own-decoder.md": [],
    "docs/testing.md": ["timm"],
    "docs/video.md": ["timm"],
}
pytestmark = pytest.mark.usefixtures("one_process")

# What makes a training of the pages small; what a command says itself comes after it.
TINY = {
    "model.backbone": "test_resnet",
    "model.options.feats_channels": "8",
    "batch_size": "2",
    "device": "cpu",
    "workers": "0",
    "augmentation.crop_size": "[32,32]",
}
TINY_SCENES = {"data.train_count": "2", "data.val_count": "2", "data.size": "[40,48]"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_readme_is_a_page() -> None:
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", pages(), ids=name)
def test_files_named_in_prose_exist(page: Path) -> None:
    """Paths in code style that begin with a folder of the repository."""
    folders = ("benchmarks", "buildtools", "csrc", "docs", "examples", "mcibi_fast", "tests")
    found = re.findall(rf"`((?:{'|'.join(folders)})/[\w./-]+)`", prose(page))
    if name(page) == "CONTRIBUTING.md":  # speaks of files that one is going to write
        found = [path for path in found if "<" not in path]
    assert [path for path in found if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_exist(page: Path) -> None:
    """Every command line of every page is one that the program takes."""
    for line in commands(page):
        words = shlex.split(line)
        if words[0] == "mcibi-fast":
            cli.build_parser().parse_args(words[1:])
        elif words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[:2] == ["pip", "install"]:
            own = re.findall(r"(?:^|\s)(?:\.|mcibi-fast)\[([\w,]+)\]", " ".join(words))
            wanted = {extra for extras in own for extra in extras.split(",")}
            assert wanted <= {*EXTRAS, "all", "test", "docs", "dev"}, line
        elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("tests", "benchmarks"):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder: photos, a video's frames, and a dataset of one's own."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "DATA" / kind / split).mkdir(parents=True)
        for i in range(3):
            label = rng.integers(3, size=(5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = (label[..., None] * 70 + rng.integers(40, size=(40, 48, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"DATA/images/{split}/{i}.jpg")
            Image.fromarray(label).save(tmp_path / f"DATA/labels/{split}/{i}.png")
    (tmp_path / "DATA" / "classes.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.jpg")
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_ALONE)
def test_python_blocks_run(page: str, folder: Path) -> None:
    """One after the other, as one program."""
    for package in RUN_ALONE[page]:
        pytest.importorskip(package)
    values: dict[str, object] = {}
    found = [block.text for block in blocks(ROOT / page) if block.language == "python"]
    assert found
    for text in found:
        exec(compile(text, page, "exec"), values)


def test_python_of_the_first_pages_is_run() -> None:
    with_python = {name(p) for p in START if any(b.language == "python" for b in blocks(p))}
    assert with_python <= {*RUN_ALONE, name(FIRST_STEPS)}


def tiny(words: list[str]) -> list[str]:
    """A command that trains, with small settings before its own; any other as it is."""
    if words[0] not in ("train", "demo") or "--resume" in words:
        return words
    settings = dict(TINY)
    if words[1:2] != ["folder"]:
        settings |= TINY_SCENES
    if "--backbone" in words:
        del settings["model.backbone"]
    settings["epochs"] = "1"
    own = [word for word in words if not word.startswith("epochs=")]
    changes = [f"{field}={value}" for field, value in settings.items()]
    return [*own, "--set", *changes, "--quiet"]


def test_commands_of_readme_are_those_of_the_first_steps() -> None:
    """So that they run there."""
    ours = {line for page in START for line in commands(page) if line.startswith("mcibi-fast")}
    assert ours - {"mcibi-fast info"} == {
        line for line in commands(FIRST_STEPS) if line.startswith("mcibi-fast")
    }


@pytest.mark.slow
def test_commands_of_the_first_steps_run(folder: Path) -> None:
    """All of them, in their order, on the built-in data; then its Python and `predict.md`."""
    assert cli.main(["info"]) == 0
    for line in commands(FIRST_STEPS):
        program, *words = shlex.split(line)
        if program == "mcibi-fast" and words[0] == "serve":
            serve(words)
        elif program == "mcibi-fast":
            assert cli.main(tiny(words)) == 0, line
    assert (folder / "runs" / "index.html").is_file()
    for page in (FIRST_STEPS, ROOT / "docs" / "predict.md"):
        values: dict[str, object] = {}
        for block in blocks(page):
            if block.language == "python":
                exec(compile(block.text, page.name, "exec"), values)


@pytest.mark.slow
def test_export_page(folder: Path) -> None:
    """Its commands on a tiny run, then its Python, which reads their files."""
    pytest.importorskip("onnxscript")
    page = ROOT / "docs" / "export.md"
    assert cli.main(tiny(["train", "demo", "--out", "runs/first"])) == 0
    for line in commands(page):
        program, *words = shlex.split(line)
        if program == "mcibi-fast" and words[0] != "serve":
            assert cli.main(words) == 0, line
    values: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, name(page), "exec"), values)


def serve(words: list[str]) -> None:
    """Starts the service on a free port, asks it once, and ends it."""
    command = [sys.executable, "-m", "mcibi_fast.cli", *words, "--port", "0", "--cpu"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[0]
            body = Path("photo.jpg").read_bytes()
            with urllib.request.urlopen(f"{address}/predict", data=body) as answer:
                assert answer.read().startswith(b"\x89PNG")
        finally:
            process.terminate()
            process.wait(30)


# --- the site -----------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a page fetches by itself: scripts, styles, pictures, fonts; not its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get("src") or (values.get("href") if tag == "link" else None)
        if address and values.get("rel") != "canonical":
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The site, built without access to the network."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)]
    environment = os.environ | proxy | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    yield out


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    found = {a for page in site.rglob("*.html") for a in Loads(page.read_text()).found}
    assert found and [a for a in found if a.startswith(("http", "//"))] == []
    styles = [file.read_text() for file in site.rglob("*.css")]
    assert not any(re.search(r"url\([\"']?(https?:)?//", style) for style in styles)


@pytest.mark.slow
def test_the_reference_has_every_public_name(site: Path) -> None:
    import mcibi_fast.nn
    import mcibi_fast.ops

    for module in (mcibi_fast.ops, mcibi_fast.nn):
        short = module.__name__.rpartition(".")[2]
        page = (site / "api" / f"{short}.html").read_text()
        missing = [n for n in module.__all__ if not re.search(rf'id="[\w.]*\.{n}"', page)]
        assert missing == []


@pytest.mark.slow
def test_formulas_are_drawn(site: Path) -> None:
    page = (site / "method.html").read_text()
    assert page.count("<math") >= 25 and "arithmatex" not in page
    assert not re.search(r":(class|meth|func):", (site / "api" / "nn.html").read_text())
