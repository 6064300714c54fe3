"""The process of a cluster: who does not answer once neither keeps it for ever nor keeps it from growing."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from distributed import SpecCluster
from tornado.ioloop import IOLoop

from jupyter_llmcloud.cluster import host
from jupyter_llmcloud.cluster.host import ClusterHost
from jupyter_llmcloud.cluster.kinds.adaptive import RankAdaptive
from jupyter_llmcloud.cluster.worker_plugin import agents_there
from jupyter_llmcloud.errors import ConnectionLost, UsageError
from jupyter_llmcloud.protocol.agent_messages import ScaleCluster


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

    num_asked = 0

    async def _nothing(self) -> None: ...

    def __await__(self) -> Any:
        return self._nothing().__await__()

    def scale(self, workers: int) -> Any:
        self.num_asked += 1


def host_of(cluster: Any, client: Any) -> ClusterHost:
    made = ClusterHost({"record": {"cluster_id": "c", "name": "c", "kind": "other"}, "lease_s": 0.0})
    made.client, made.cluster = client, cluster
    return made


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


class Given:
    """A client that finds a worker once a cluster has been asked so often."""

    def __init__(self, cluster: Scaled, after: int) -> None:
        self._cluster = cluster
        self._after = after

    async def run(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"tcp://again": {"address": "again"}} if self._cluster.num_asked >= self._after else {}


def test_a_worker_that_dask_has_not_given_up_yet_is_replaced_when_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job has ended some seconds before the cluster is scaled to what it had."""
    monkeypatch.setattr(host, "ASK_AGAIN_S", 0.001)
    monkeypatch.setattr(host, "POLL_S", 0.001)
    cluster = Scaled()
    asyncio.run(asyncio.wait_for(host_of(cluster, Given(cluster, after=3))._scale(1), 10))
    assert cluster.num_asked == 3


def test_what_a_batch_system_has_no_place_for_is_not_waited_for_but_asked_for_until_another_size_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ASK_AGAIN_S", "POLL_S", "SCALE_S"):
        monkeypatch.setattr(host, name, 0.001)

    async def scaled() -> None:
        cluster = Scaled()
        process = host_of(cluster, Given(cluster, after=10**9))
        await asyncio.wait_for(process._change_size(ScaleCluster(workers=2)), 10)
        while cluster.num_asked < 5:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(process._change_size(ScaleCluster(workers=0)), 10)
        asked = cluster.num_asked
        await asyncio.sleep(0.05)
        assert cluster.num_asked == asked

    asyncio.run(scaled())


class OfAnOperator(Scaled):
    """As Kubernetes' operator has it: what is asked for happens when it is awaited."""

    was_asked = False

    def scale(self, workers: int) -> Any:
        async def asked() -> None:
            self.num_asked += 1

        return asked()

    def adapt(self, minimum: int, maximum: int) -> None:
        self.was_asked = True


def test_a_cluster_that_does_what_is_awaited_is_scaled() -> None:
    cluster = OfAnOperator()
    asyncio.run(asyncio.wait_for(host_of(cluster, Given(cluster, after=1))._scale(1), 10))
    assert cluster.num_asked == 1


def test_a_cluster_that_would_end_workers_whose_ranks_train_is_not_adapted() -> None:
    cluster = OfAnOperator()
    with pytest.raises(UsageError, match="a worker whose ranks train is idle"):
        asyncio.run(host_of(cluster, None)._change_size(ScaleCluster(minimum=1, maximum=2)))
    assert not cluster.was_asked


class Adaptive:
    """What Dask's `adapt` returns."""

    is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


def test_a_cluster_that_is_scaled_does_not_go_on_between_bounds() -> None:
    adaptive = Adaptive()

    class Adapted(Scaled):
        def adapt(self, **_: Any) -> Adaptive:
            return adaptive

        adapt.__signature__ = inspect.signature(SpecCluster.adapt)  # type: ignore[attr-defined]

    async def both() -> None:
        cluster = Adapted()
        process = host_of(cluster, Given(cluster, after=1))
        await process._change_size(ScaleCluster(minimum=1, maximum=2))
        assert not adaptive.is_stopped
        await process._change_size(ScaleCluster(workers=1))

    asyncio.run(asyncio.wait_for(both(), 10))
    assert adaptive.is_stopped


def test_bounds_bring_another_worker_for_one_that_was_lost() -> None:
    """Dask removes the lost one from those that it has asked for, and goes on planning with it."""

    class Cluster(Scaled):
        plan, requested, observed = {"a", "b"}, {"a"}, {"a"}

        def __init__(self) -> None:
            self.loop = IOLoop.current()

    async def recommended() -> list[dict[str, Any]]:
        adaptive = RankAdaptive(Cluster(), client=None, interval="1 h")  # type: ignore[arg-type]
        found = [await adaptive.recommendations(2)]
        Cluster.requested = {"a", "b"}
        found.append(await adaptive.recommendations(2))
        adaptive.stop()
        return found

    assert asyncio.run(recommended()) == [{"status": "up", "n": 2}, {"status": "same"}]


def test_what_a_worker_has_failed_with_is_said() -> None:
    rows = {"tcp://first": RuntimeError("the node agent did not start"), "tcp://second": {"address": "second"}}
    with pytest.raises(RuntimeError, match="did not start"):
        asyncio.run(agents_there(Dying(rows)))  # type: ignore[arg-type]
