"""The service: a page to upload a picture, and the addresses that the page uses.

It is meant for one person on one machine. It answers only requests whose ``Host`` is this machine,
so that a web site cannot reach it through a name of its own, and reads an upload only up to the
limit for image files (MAX_FILE_BYTES).
"""

from __future__ import annotations

import asyncio
import io
from importlib import resources
from typing import Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image

from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import decode_pixels
from mcibi_fast.errors import TooLittleMemoryError, enough_memory
from mcibi_fast.limits import limit
from mcibi_fast.serving.labellers import Labeller
from mcibi_fast.viz.overlay import blend, indexed

Result = Literal["overlay", "labels"]

_NAME = "upload"  # of a picture, in messages
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src blob:; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def create_app(labeller: Labeller) -> FastAPI:
    """The service around a model.

    ``GET /`` is the page. ``POST /predict`` takes an image file as its body and returns a PNG: the
    overlay, or with ``?result=labels`` the class indices with a palette. ``GET /classes`` lists
    names and colours; ``GET /health`` answers once the model is loaded. Errors are JSON with one
    line: 400 for a file that is no image, 413 for one that exceeds a limit, 503 for too little
    memory.
    """
    # FastAPI's own pages load scripts from a web service.
    app = FastAPI(title="mcibi_fast", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    page = resources.files("mcibi_fast.serving").joinpath("page.html").read_text()
    one_at_a_time = asyncio.Lock()  # a model's memory and threads are for one picture
    palette = np.array(labeller.spec.palette, np.uint8)

    def predict(content: bytes, result: Result) -> bytes:
        with enough_memory(_NAME, "make the image smaller"):
            pixels = decode_pixels(content, _NAME)
            labels = labeller(pixels)
            if result == "labels":
                return _png(indexed(labels, palette))
            return _png(Image.fromarray(blend(pixels, labels, palette)))

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/classes")
    def classes() -> list[dict[str, object]]:
        pairs = zip(labeller.spec.classes, labeller.spec.palette, strict=True)
        return [{"name": name, "colour": colour} for name, colour in pairs]

    @app.post("/predict")
    async def upload(request: Request, result: Result = "overlay") -> Response:
        async with one_at_a_time:
            try:
                content = await _body(request)
                picture = await run_in_threadpool(predict, content, result)
            except _TooLargeError as error:
                return JSONResponse({"error": str(error)}, 413)
            except DataError as error:
                return JSONResponse({"error": str(error)}, 400)
            except TooLittleMemoryError as error:
                return JSONResponse({"error": str(error)}, 503)
        return Response(picture, media_type="image/png", headers=_HEADERS)

    return app


class _TooLargeError(ValueError):
    """An upload exceeds MAX_FILE_BYTES."""


async def _body(request: Request) -> bytes:
    """The request's body; it is not read further than the limit."""
    allowed = limit("MAX_FILE_BYTES")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > allowed:
            raise _TooLargeError(
                f"{_NAME}: has more than MAX_FILE_BYTES ({allowed:,}); set "
                "MCIBI_FAST_MAX_FILE_BYTES in the environment to raise it"
            )
    return bytes(content)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
