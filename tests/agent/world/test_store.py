"""The process that holds the store by which ranks meet, by values: what forks it is a stand-in."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.agent.world.store import Store
from jupyter_llmcloud.errors import WorldError


class DyingStores:
    """A zygote whose children end at once, after some last words."""

    async def fork(self, request: Any, fds: list[int]) -> int:
        os.write(fds[2], b"no module named torch")
        return 1


def test_a_store_that_ends_at_its_start_is_told_at_once_with_its_last_words(tmp_path: Path) -> None:
    store = Store("w/store1", tmp_path / "store.log")
    with pytest.raises(WorldError, match=r"ended at its start(.|\n)*no module named torch"):
        asyncio.run(asyncio.wait_for(store.start(DyingStores(), "127.0.0.1"), 10))  # type: ignore[arg-type]
    store.close()
