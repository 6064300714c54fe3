"""What a process that runs tests knows of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = pytest.StashKey[Path]()  # below which its tests write; each worker of pytest-xdist has one of its own


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs tests for another pytest."""
    return hasattr(config, "workerinput")
