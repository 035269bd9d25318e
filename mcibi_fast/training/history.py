"""A run's ``history.jsonl``: one line per reading of the loss and per evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcibi_fast.untrusted import parse_json, read_bytes

_LARGEST = 2**63


def read_history(path: Path) -> list[dict[str, Any]]:
    """All complete lines, in order; a crash may have cut the last one short.

    Each is a dictionary with "step" and some of "lr", "loss", "losses", "epoch", "memory" and
    "metrics" (see `Trainer`), whose numbers may be NaN or infinite.

    Raises:
        ValueError: a line is something else (the message has file and line), or the file is too
            long.
    """
    try:
        content = read_bytes(path, "MAX_HISTORY_BYTES")
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            entries.append(_checked(parse_json(line)))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: no line of a run's history: {error}"
            ) from error
    return entries


def _checked(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError("expected a dictionary")
    if not _is_count(entry.get("step")):
        raise ValueError("'step' is no number of steps")
    optional = {
        "epoch": _is_count,
        "lr": _is_number,
        "loss": _is_number,
        "losses": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        "memory": _is_memory,
        "metrics": _is_metrics,
    }
    for name, fits in optional.items():
        if name in entry and not fits(entry[name]):
            raise ValueError(f"{name!r} is not what a training writes")
    return entry


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < _LARGEST
    return isinstance(value, float)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0


def _is_memory(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    mean, std = value.get("mean"), value.get("std")
    if not isinstance(mean, list) or not isinstance(std, list):
        return False
    return len(mean) == len(std) and all(map(_is_number, mean + std))


def _is_metrics(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("classes"), list):
        return False
    scores = [number for name, number in value.items() if name != "classes"]
    for row in value["classes"]:
        if not (isinstance(row, dict) and isinstance(row.get("class"), str) and "iou" in row):
            return False
        scores += [number for name, number in row.items() if name != "class"]
    return "mean_iou" in value and all(score is None or _is_number(score) for score in scores)
