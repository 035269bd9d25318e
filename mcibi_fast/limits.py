"""Limits on what a file from elsewhere may demand of this machine.

Each limit has a name, which the error message gives. ``MCIBI_FAST_<NAME>=N`` in the environment
changes it, also for the processes that load data.
"""

from __future__ import annotations

import os

# Largest number that a stored configuration or specification may give for each of its fields. Their
# cost shows in no shape of a weight. The command line and Python may give more.
_FIELDS = {
    **dict.fromkeys(("crop_size", "short_side", "long_side", "size", "window", "stride"), 8192),
    "scale": 16,
    "scales": 16,
    "stages": 100,
    "pool_scales": 64,
    "dilations": 1000,
    "history": 1000,
    "gap": 1000,
    "memory_frames": 1000,
    "length": 10**6,
    "train_count": 10**8,
    "val_count": 10**8,
    "batch_size": 10**6,
    "eval_batch_size": 10**4,
    "workers": 256,
}

LIMITS = {
    "MAX_PIXELS": 1 << 26,  # an image, a mask or a frame of a video: 8192x8192
    "MAX_SCANS": 1000,  # of a JPEG, each of which may go over all pixels
    "MAX_TIFF_VALUES": 1 << 20,  # numbers of metadata in a TIFF, such as the places of its strips
    "MAX_FILE_BYTES": 1 << 28,  # the file of an image or a mask
    "MAX_TEXT_BYTES": 1 << 25,  # a list of names, a list of classes or an index of shards
    "MAX_NAMES": 1_000_000,  # names in a list, frames of the videos in a list
    "MAX_ANNOTATION_BYTES": 1 << 30,  # PASCAL-Context's or COCO's annotations
    "MAX_MAT_BYTES": 1 << 27,  # a .mat file, decompressed
    "MAX_ZIP_ENTRIES": 1_000_000,  # files and folders in a zip file
    "MAX_ZIP_LEVELS": 32,  # nested folders in a zip file
    "MAX_SHARD_BYTES": 1 << 34,  # a shard that is downloaded
    "MAX_JSON_BYTES": 1 << 20,  # a configuration, or the specification in a file of weights
    "MAX_HISTORY_BYTES": 1 << 28,  # a million steps, each with its loss, take half of it
    "MAX_TENSORS": 20_000,  # tensors in a file of weights
    "MAX_PICKLE_BYTES": 1 << 24,  # names and shapes, without values, in a file of torch
    "MAX_ENTRIES": 4_000_000,  # tensors, numbers, texts and containers in a file of torch
    "MAX_SHARING": 4,  # tensors that share the same values in a file of torch, on average
    "MAX_UNPACKING": 4,  # size of the arrays in an .npz file, as a multiple of the model's weights
    "MAX_PARAMETERS": 20,  # parameters that a model creates for each tensor in its file
    "MAX_TRANSIENT_BYTES": 1 << 30,  # tensors that a model creates and that are in no file
    "MAX_STAGES": 16,  # stages of a Swin in a file of the released code; the published ones have 4
    **{f"MAX_CONFIG_{name.upper()}": most for name, most in _FIELDS.items()},
}


def limit(name: str) -> int:
    """The limit called ``name``; ValueError if the environment sets it to no whole number."""
    variable = f"MCIBI_FAST_{name}"
    text = os.environ.get(variable)
    if text is None:
        return LIMITS[name]
    if not text.isdecimal():
        raise ValueError(f"{variable}: expected a whole number, got {text!r}")
    return int(text)


def check_field(name: str, value: object) -> None:
    """Raises ValueError if ``value``, or a number in it, is above the limit of a stored field.

    Args:
        name: path of the field, such as ``model.options.stages``; its last part decides.
        value: what a file gives for it.
    """
    field = name.rpartition(".")[2]
    if field in _FIELDS:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)):
                check_limit(f"MAX_CONFIG_{field.upper()}", number, f"{name}: a file gives {number}")


def check_limit(name: str, amount: float, what: str, error: type[ValueError] = ValueError) -> None:
    """Raises ``error`` if ``amount`` is more than the limit called ``name``.

    The message consists of ``what``, which names the file and says how much it demands, then the
    limit and how to raise it.
    """
    allowed = limit(name)
    if amount > allowed:
        raise error(
            f"{what}, more than {name} ({allowed:,}); "
            f"set MCIBI_FAST_{name} in the environment to raise it"
        )
