"""How a checkpoint is used, as its run says: test size, views, windows, mirrored classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcibi_fast.data import DATASETS
from mcibi_fast.defaults import LARGE_WINDOW
from mcibi_fast.recipes import InferenceConfig, NamedData, ShardsData, TrainConfig
from mcibi_fast.recipes.config import read_settings, read_stored
from mcibi_fast.recipes.sources import Sized, StoredShardsData
from mcibi_fast.recipes.stored import rebuild


def trained_config(weights: Path) -> TrainConfig | None:
    """The configuration of the run that a weights file lies in, or None.

    That is ``RUN/checkpoints/NAME/FILE`` or ``RUN/FILE``; a ``config.json`` elsewhere above is
    nobody's, and one of `mcibi_fast.models.hub` no run's.
    """
    own, *above = weights.resolve().parents
    folders = [own, *above[1:2]] if above and above[0].name == "checkpoints" else [own]
    for folder in folders:
        if (folder / "config.json").is_file() and "library_name" not in read_stored(folder):
            return read_settings(folder)
    return None


def usual_inference(
    trained: TrainConfig | None, brought: Mapping[str, Any] | None, file: Path
) -> InferenceConfig:
    """How a checkpoint is tested unless something else is asked for.

    Args:
        trained: the checkpoint's run.
        brought: what the checkpoint itself says (``ModelSpec.inference``), which comes first.
        file: the checkpoint.

    Raises:
        ValueError: the checkpoint says something that makes no sense.
    """
    if brought is None:
        return trained.inference if trained else InferenceConfig()
    try:
        usual = rebuild(InferenceConfig, brought)
        usual.validate()
    except ValueError as error:
        raise ValueError(f"checkpoint: {file}: {error}") from error
    return usual


def usual_window(trained: TrainConfig | None) -> tuple[int, int]:
    """Windows for large images: as large as the run's crops and at least `LARGE_WINDOW`."""
    height, width = trained.augmentation.crop_size if trained else LARGE_WINDOW
    return max(height, LARGE_WINDOW[0]), max(width, LARGE_WINDOW[1])


def own_test_data(trained: TrainConfig | None) -> Sized | None:
    """The run's data, if they have a test size."""
    data = trained.data if trained else None
    return data if isinstance(data, Sized) else None


def mirrored_classes(data: object) -> Sequence[tuple[int, int]]:
    """Classes that a mirrored image swaps, of a run's data."""
    if isinstance(data, StoredShardsData):
        raise ValueError(
            f"--flip: which classes a mirrored image swaps is in the run's shards ({data.root}), "
            "which are not fetched because its config.json says so; give --no-flip"
        )
    if isinstance(data, ShardsData):
        return data.dataset(data.val_split).flip_pairs  # only the shards know them
    known = DATASETS.get(data.name) if isinstance(data, NamedData) else None
    return known.flip_pairs if known else ()
