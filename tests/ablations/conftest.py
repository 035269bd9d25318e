"""One process and one thread; which runs are trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcibi_fast.ablations import runs


@pytest.fixture(autouse=True)
def alone(own_generator: None) -> None:
    """Each test."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that training was called for."""
    names: list[str] = []
    train = runs.train

    def noted(config: object, out: Path, **options: object) -> object:
        names.append(out.name + (" resumed" if options["resume"] else ""))
        return train(config, out, **options)

    monkeypatch.setattr(runs, "train", noted)
    return names
