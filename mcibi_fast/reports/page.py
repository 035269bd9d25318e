"""A report as one HTML file: no external resources, pictures embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #28303a; background: #f6f5f2; margin: 0; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .5rem; }}
table {{ border-collapse: collapse; background: #fff; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem 1rem; border-bottom: 1px solid #e4e1da; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ font-weight: 600; }}
figure {{ margin: .8rem 0; padding: .8rem; background: #fff; border: 1px solid #e4e1da; }}
.scroll {{ overflow-x: auto; }}
img {{ max-width: 100%; height: auto; display: block; margin: 0 auto; }}
figcaption {{ font-size: .88rem; color: #5c6570; margin-top: .5rem; }}
pre {{ background: #fff; border: 1px solid #e4e1da; padding: .8rem; overflow-x: auto;
  font-size: .82rem; }}
details {{ margin: .6rem 0; }}
summary {{ cursor: pointer; }}
.chips {{ display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }}
.chips i {{ display: inline-block; width: 1.5em; height: .9em; margin-right: .4em; }}
@media (max-width: 45rem) {{
  main {{ padding: 1.2rem .8rem 3rem; }}
  th, td {{ padding: .35rem .6rem; }}
  .wide img {{ max-width: none; width: 44rem; }}
  .wide::before {{ content: "swipe to see all →"; font-size: .8rem; color: #5c6570; }}
}}
</style>
</head>
<body><main>
<h1>{title}</h1>
{body}
</main></body>
</html>
"""


class Report:
    """Collects headings, text, tables and pictures, in order.

    Args:
        title: of the page.

    Attributes:
        pictures: PNG files of the pictures that were given a name.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.pictures: dict[str, bytes] = {}
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Text as it is, in a fixed-width font."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def legend(self, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        """The classes' names beside their colours."""
        chips = "".join(
            f'<span><i style="background: rgb({r}, {g}, {b})"></i>{escape(name)}</span>'
            for name, (r, g, b) in zip(classes, palette, strict=True)
        )
        self._parts.append(f'<p class="chips">{chips}</p>')

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, fold: str = ""
    ) -> None:
        """A table; the first column is flush left, the others right.

        With ``fold`` it is hidden behind this line until a click.
        """
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        table = f'<div class="scroll">{table}</div>'
        if fold:
            table = f"<details><summary>{escape(fold)}</summary>{table}</details>"
        self._parts.append(table)

    def picture(
        self, picture: Image.Image | bytes, caption: str, *, name: str = "", wide: bool = False
    ) -> None:
        """A picture with its caption.

        Args:
            picture: a PIL image, or a PNG file's bytes.
            caption: under it.
            name: if given, it is also in ``pictures``; the first one of a name stays.
            wide: on a narrow screen it stays legible and scrolls sideways.
        """
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
            picture = buffer.getvalue()
        if name:
            self.pictures.setdefault(name, picture)
        data = base64.b64encode(picture).decode()
        scroll = ' class="scroll wide"' if wide else ""
        self._parts.append(
            f'<figure><div{scroll}><img src="data:image/png;base64,{data}" '
            f'alt="{escape(caption)}"></div><figcaption>{escape(caption)}</figcaption></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        return _PAGE.format(title=escape(self.title), body="\n".join(self._parts))
