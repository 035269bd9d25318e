"""From a trained run to a service: export to ONNX, then a page to upload pictures.

    mcibi-fast train demo --out runs/first
    pip install ".[onnx,serve]"
    python examples/export_and_serve.py runs/first
    # open http://127.0.0.1:8000

The service runs the ONNX file in ONNX Runtime. `mcibi-fast serve` starts the same service; here it
is taken apart, so that you can add routes of your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from mcibi_fast.inference import export
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import find_weights
from mcibi_fast.serving.app import create_app
from mcibi_fast.serving.labellers import open_labeller


def build(run: str, out: Path) -> FastAPI:
    """Exports a run's best checkpoint, unless that is done, and makes the service around it."""
    if not out.exists():
        model, spec = load_model(find_weights(run))
        for agreement in export.save(model, spec, out):
            print(agreement)  # the file's outputs beside the model's
    app = create_app(open_labeller(out))

    @app.get("/about")
    def about() -> dict[str, str]:
        return {"model": run, "file": str(out)}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run's directory")
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(build(args.run, args.out), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
