"""A report as one HTML file that loads nothing from outside: pictures are embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

_TEMPLATES = Environment(
    loader=PackageLoader("mcibi_fast.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Report:
    """Collects headings, text, tables and pictures in the order in which they appear.

    All text is escaped by the template, ``templates/page.html``.

    Args:
        title: of the page.

    Attributes:
        pictures: the named pictures as PNG files, by name.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.pictures: dict[str, bytes] = {}
        self._parts: list[dict[str, Any]] = []  # what the template reads

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._add("heading", text=text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text=text)

    def code(self, text: str) -> None:
        """Text as it is, in a fixed-width font."""
        self._add("code", text=text)

    def legend(self, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        """The classes' names beside their colours, three numbers from 0 to 255 each."""
        self._add("legend", entries=list(zip(classes, palette, strict=True)))

    def links(self, entries: Sequence[tuple[str, str]]) -> None:
        """A list of links: texts and addresses, which are relative and percent-encoded."""
        self._add("links", entries=entries)

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, fold: str = ""
    ) -> None:
        """A table, its first column aligned to the left and all others to the right.

        With ``fold`` only this line shows until it is clicked.
        """
        self._add("table", header=header, rows=rows, fold=fold)

    def picture(
        self, picture: Image.Image | bytes, caption: str, *, name: str = "", wide: bool = False
    ) -> None:
        """A picture with its caption.

        Args:
            picture: a PIL image, or the bytes of a PNG file.
            caption: the text under it.
            name: also keep it in ``pictures`` under this name, unless the name is taken.
            wide: on a narrow screen, scroll sideways instead of shrinking the picture.
        """
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
            picture = buffer.getvalue()
        if name:
            self.pictures.setdefault(name, picture)
        self._add("picture", png=base64.b64encode(picture).decode(), caption=caption, wide=wide)

    def html(self) -> str:
        """The whole page."""
        template = _TEMPLATES.get_template("page.html")
        return template.render(title=self.title, parts=self._parts)

    def _add(self, kind: str, **values: Any) -> None:
        self._parts.append({"kind": kind, **values})
