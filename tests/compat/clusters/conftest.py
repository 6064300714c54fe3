"""A pool of clusters as a Jupyter server holds it, for every kind that is tried here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clusters import Server


@pytest.fixture
def server(own_root: Path) -> Iterator[Server]:
    server = Server()
    yield server
    server.end()
