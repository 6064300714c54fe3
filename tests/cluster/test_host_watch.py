"""A cluster whose owner has gone ends, also when its scheduler has not answered once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jupyter_llmcloud.cluster import host
from jupyter_llmcloud.cluster.host import ClusterHost


class Forgetful:
    """A client of Dask whose connection breaks at first."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def run(self, *_: Any, **__: Any) -> dict[str, bool]:
        self.num_asked += 1
        if self.num_asked == 1:
            raise OSError("Timed out during handshake")
        return {"tcp://worker": False}


def test_a_question_that_was_not_answered_does_not_keep_a_cluster_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "WATCH_S", 0.001)

    async def watched() -> int:
        cluster = ClusterHost({"record": {"cluster_id": "c", "name": "c", "kind": "local"}, "lease_s": 0.0})
        cluster.client = client = Forgetful()  # type: ignore[assignment]
        watch = asyncio.ensure_future(cluster._watch_owner())
        finished = asyncio.ensure_future(cluster._finished.wait())
        await asyncio.wait([watch, finished], return_when=asyncio.FIRST_COMPLETED, timeout=5)
        assert cluster._finished.is_set()
        await watch
        return client.num_asked

    assert asyncio.run(watched()) >= 2
