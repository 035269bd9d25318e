"""``mcibi-fast serve``."""

from __future__ import annotations

import argparse
import errno
import socket

from mcibi_fast import extras
from mcibi_fast.commands import options
from mcibi_fast.terminal import say

HELP = "show a page on this machine that segments uploaded pictures"
EXTRA = "serve"
EXAMPLES = ("mcibi-fast serve runs/first", "mcibi-fast serve model.onnx --port 0")

_HOST = "127.0.0.1"  # no other machine can connect
_PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and where the page is."""
    options.add_checkpoint(parser, note=", or an .onnx file of `export`")
    parser.add_argument(
        "--port", type=int, default=_PORT, help=f"of 127.0.0.1 (default: {_PORT}; 0: a free one)"
    )
    options.add_cpu(parser)


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    import torch

    from mcibi_fast.serving.app import create_app
    from mcibi_fast.serving.labellers import open_labeller

    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port: expected 0 to 65535, got {args.port}")
    uvicorn = extras.load("mcibi-fast serve", "uvicorn")
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    app = create_app(open_labeller(args.checkpoint, device))
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_HOST, args.port))
            listening.listen()  # before the address is said
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise ValueError(
                    f"--port: {args.port} cannot be used ({error.strerror}); give another one"
                ) from error
            raise
        say(f"http://{_HOST}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=16)
        uvicorn.Server(config).run([listening])
