"""PyTorch's errors in a training, in terms of the settings that cause them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mcibi_fast.errors import TooLittleMemoryError, TrainingError, is_out_of_memory, memory_line
from mcibi_fast.recipes.config import TrainConfig

_ONE_VALUE = re.compile(r"Expected more than 1 value per channel when training.*?\[([\d, ]+)\]")
# Frameworks that reduce the map to one value per channel, and by what.
_POOLING = {
    "pspnet": "pyramid pooling to 1x1",
    "upernet": "pyramid pooling to 1x1",
    "deeplabv3": "ASPP's image pooling",
}


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Names the settings to change where PyTorch's error names none.

    Raises:
        TrainingError: a batch norm gets one value per channel.
        TooLittleMemoryError: an allocation failed.
    """
    try:
        yield
    except ValueError as error:
        found = _ONE_VALUE.search(str(error))
        if not found:
            raise
        raise TrainingError(_one_value(config, found[1])) from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, TooLittleMemoryError) or not is_out_of_memory(error):
            raise
        crop = "x".join(map(str, config.augmentation.crop_size))
        raise TooLittleMemoryError(
            f"training: {memory_line(error)}; use a smaller batch_size ({config.batch_size}), a "
            f"larger accumulate ({config.accumulate}), or a smaller augmentation.crop_size ({crop})"
        ) from error


def _one_value(config: TrainConfig, shape: str) -> str:
    framework = config.model.name.split("_")[0]
    height, width = config.augmentation.crop_size
    cause = f"the crops of {height}x{width} are small"
    advice = "a larger augmentation.crop_size"
    if framework in _POOLING:
        cause = f"{framework} has {_POOLING[framework]}"
        advice = "a framework without it (fcn)"
    return (
        f"a batch norm in training gets one value per channel (a map of "
        f"{shape.replace(', ', 'x')}): batch_size={config.batch_size} with "
        f"accumulate={config.accumulate} leaves one image at a time in a process, and {cause}; use "
        f"a larger batch_size, a smaller accumulate, or {advice}"
    )
