"""Where what these tests compile is kept."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compile_cache(request: pytest.FixtureRequest) -> Path:
    """A folder that lasts between runs; what is in it is named by the hash of its sources."""
    return request.config.cache.mkdir("host_executor")
