"""The process of a cluster: who does not answer once neither keeps it for ever nor keeps it from growing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jupyter_llmcloud.cluster import host
from jupyter_llmcloud.cluster.host import ClusterHost
from jupyter_llmcloud.cluster.worker_plugin import agents_there
from jupyter_llmcloud.errors import ConnectionLost


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


class Dying:
    """A client whose cluster is asked for one more worker in the moment in which one goes."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self._answers = list(answers)

    async def run(self, *_: Any, on_error: str = "raise", **__: Any) -> dict[str, Any]:
        rows = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        for row in rows.values():
            if isinstance(row, Exception) and on_error == "raise":
                raise row
        return rows


class Scaled:
    """A cluster of Dask that has as many workers as are asked for."""

    async def _nothing(self) -> None: ...

    def __await__(self) -> Any:
        return self._nothing().__await__()

    def scale(self, workers: int) -> None: ...


@pytest.mark.parametrize("last", ["gone", "silent"])
def test_a_cluster_grows_though_a_worker_goes_meanwhile_and_only_agents_without_a_worker_end(
    last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system ends jobs when their time is over."""
    ended: list[str] = []

    class Agent:
        @staticmethod
        async def open(address: str, _: float) -> Any:
            ended.append(address)
            raise ConnectionLost("it has ended already")

    monkeypatch.setattr(host, "AgentConnection", Agent)
    rows = {f"tcp://{name}": {"address": name} for name in ("first", "second", "third")}
    silent = OSError("Connection reset by peer")
    first = {key: rows[key] for key in ("tcp://first", "tcp://second")}
    while_it_goes = {"tcp://first": silent, "tcp://second": rows["tcp://second"], "tcp://third": rows["tcp://third"]}
    later = {key: row for key, row in while_it_goes.items() if last == "silent" or key != "tcp://first"}
    cluster = ClusterHost({"record": {"cluster_id": "c", "name": "c", "kind": "local"}, "lease_s": 0.0})
    cluster.client = Dying(first, while_it_goes, later)  # type: ignore[assignment]
    cluster.cluster = Scaled()
    asyncio.run(cluster._scale(2))
    assert ended == (["first"] if last == "gone" else [])


def test_a_worker_that_dask_has_not_given_up_yet_is_replaced_when_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job has ended some seconds before the cluster is scaled to what it had."""
    monkeypatch.setattr(host, "ASK_AGAIN_S", 0.001)

    class Slow(Scaled):
        num_asked = 0

        def scale(self, workers: int) -> None:
            self.num_asked += 1

    class Client:
        async def run(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {"tcp://again": {"address": "again"}} if slow.num_asked > 2 else {}

    slow = Slow()
    cluster = ClusterHost({"record": {"cluster_id": "c", "name": "c", "kind": "local"}, "lease_s": 0.0})
    cluster.client, cluster.cluster = Client(), slow  # type: ignore[assignment]
    asyncio.run(asyncio.wait_for(cluster._scale(1), 10))
    assert slow.num_asked == 3


def test_what_a_worker_has_failed_with_is_said() -> None:
    rows = {"tcp://first": RuntimeError("the node agent did not start"), "tcp://second": {"address": "second"}}
    with pytest.raises(RuntimeError, match="did not start"):
        asyncio.run(agents_there(Dying(rows)))  # type: ignore[arg-type]
