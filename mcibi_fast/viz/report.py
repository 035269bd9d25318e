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
img {{ max-width: 100%; height: auto; display: block; margin: 0 auto; }}
figcaption {{ font-size: .88rem; color: #5c6570; margin-top: .5rem; }}
pre {{ background: #fff; border: 1px solid #e4e1da; padding: .8rem; overflow-x: auto;
  font-size: .82rem; }}
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
    """

    def __init__(self, title: str) -> None:
        self.title = title
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

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is flush left, the others right."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, picture: Image.Image | bytes, caption: str) -> None:
        """A picture (a PIL image, or a PNG file's bytes) with its caption."""
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
            picture = buffer.getvalue()
        data = base64.b64encode(picture).decode()
        self._parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole page."""
        return _PAGE.format(title=escape(self.title), body="\n".join(self._parts))
