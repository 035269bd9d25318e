"""Optional packages, and the one line that says how to install those that are missing."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from typing import Any

_MODELS = ("timm", "safetensors", "huggingface_hub")
_TRAIN = (*_MODELS, "accelerate", "torchvision", "tensorboard", "tqdm", "PIL", "scipy", "sklearn")
EXTRAS: dict[str, tuple[str, ...]] = {
    "models": _MODELS,
    "train": _TRAIN,
    "report": (*_TRAIN, "matplotlib", "jinja2"),
    "streaming": (*_TRAIN, "webdataset", "filelock"),
    "video": (*_TRAIN, "cv2"),
    "onnx": (*_TRAIN, "onnx", "onnxruntime", "onnxscript"),
}
"""The modules of each extra in pyproject.toml; one that includes another comes after it."""

DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}
"""What is installed for a module of another name."""


class MissingExtra(ImportError, ValueError):
    """An optional package is missing or broken; the message is one line that says what to do.

    A ValueError, too: who asked for what needs the package asked for something impossible.
    """


def require(what: str, *modules: str) -> None:
    """Checks that optional packages are installed; imports none of them.

    Args:
        what: needs them; begins the message.
        modules: their names in ``import``, all of one extra.

    Raises:
        MissingExtra: such as ``mcibi_fast.models needs timm: pip install "mcibi-fast[models]"``.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extra = next(extra for extra, names in EXTRAS.items() if {*missing} <= {*names})
        names = ", ".join(DISTRIBUTIONS.get(name, name) for name in missing)
        raise MissingExtra(f'{what} needs {names}: pip install "mcibi-fast[{extra}]"')


def load(what: str, module: str) -> Any:
    """Imports an optional module where it is needed.

    Args:
        what: needs it; begins the message.
        module: such as "torchvision.transforms.v2.functional".

    Raises:
        MissingExtra: its package is missing, or does not import.
    """
    package = module.partition(".")[0]
    require(what, package)
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision for another torch fails in ways of its own
        name = DISTRIBUTIONS.get(package, package)
        fit = f"torch {metadata.version('torch')}" if package == "torchvision" else "this Python"
        raise MissingExtra(
            f"{what} needs {name}, which does not import here ({error}); install the {name} made "
            f"for {fit}"
        ) from error
