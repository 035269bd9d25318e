"""Hooks of mkdocs (mkdocs.yml): pages from elsewhere in the repository, links, formulas.

Pages link to files of the repository by relative paths, as a reader of the repository needs them.
In the site, a link to another page leads there; a link to any other file becomes the file's name.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # files that are pages, and what they are called in the site
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/NOTES.md": "NOTES.md",
    "csrc/testing/README.md": "HOST-EXECUTOR.md",
}
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL
)
_ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):(<code>)[~!.]?")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links between files of the repository links between pages; code stays as it is."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_linked(markdown[end : fence.start()], page), fence.group()]
        end = fence.end()
    return "".join([*parts, _linked(markdown[end:], page)])


def _linked(text: str, page: Page) -> str:
    names = {name: source for source, name in OUTSIDE.items()}
    uri = page.file.src_uri
    source = names.get(uri, f"docs/{uri}")

    def replace(link: re.Match[str]) -> str:
        mark, label, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return link.group()
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if wanted.startswith("docs/"):
            found = wanted.removeprefix("docs/")
        elif wanted in OUTSIDE:
            found = OUTSIDE[wanted]
        elif (ROOT / wanted).exists():
            return label if label.strip("`") == wanted else f"{label} (`{wanted}`)"
        else:
            raise PluginError(f"{source}: the link to {target} leads nowhere")
        relative = os.path.relpath(found, posixpath.dirname(uri) or ".")
        return f"{mark}[{label}]({relative}{hash_}{anchor})"

    return _LINK.sub(replace, text)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draws formulas as MathML, which browsers show without a script; drops what is Sphinx's."""

    def draw(formula: re.Match[str]) -> str:
        text = html.unescape(formula.group(2))
        if formula.group(1) == "span":
            return convert(text)
        return f'<div class="formula">{convert(text, display="block")}</div>'

    content = _ROLE.sub(r"\1", _FORMULA.sub(draw, content))
    return content.replace("<p>::</p>", "").replace("::</p>", ":</p>")
