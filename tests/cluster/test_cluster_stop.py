"""A cluster that is stopped, as whoever looks at it meanwhile sees it: the host process is a stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.cluster.host_launcher import HostProcesses
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.errors import NotFound

pytestmark = pytest.mark.usefixtures("own_root")


@pytest.fixture
def host() -> Iterator[subprocess.Popen[bytes]]:
    with stand_in() as process:
        yield process


@contextlib.contextmanager
def stand_in() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def saved(host: subprocess.Popen[bytes], cluster_id: str = "c1") -> ClusterRecord:
    """A cluster of this process by the name of "mine"."""
    started = psutil.Process(host.pid).create_time()
    record = ClusterRecord(cluster_id, "mine", "local", state="running", pid=host.pid, pid_started=started)
    record.save()
    return record


async def stopped_while(
    monkeypatch: pytest.MonkeyPatch, pool: ClusterPool, host: subprocess.Popen[bytes], look: object
) -> None:
    """Stop it; its host process has ended when `look` is awaited, and is waited for still."""

    async def stop(*_: object) -> None:
        host.kill()
        host.wait()
        await look()  # type: ignore[operator]

    async def start(*_: object) -> None:
        raise AssertionError("the cluster that ends was started again")

    monkeypatch.setattr(HostProcesses, "stop", stop)
    monkeypatch.setattr(HostProcesses, "start", start)
    assert await pool.stop("mine") == "mine"


async def test_it_ends_once_though_it_is_listed_meanwhile(
    monkeypatch: pytest.MonkeyPatch, host: subprocess.Popen[bytes]
) -> None:
    saved(host)
    pool = ClusterPool(os.getpid(), 10)
    await pool.restore()

    async def look() -> None:
        assert await pool.list() == []

    await stopped_while(monkeypatch, pool, host, look)
    assert await pool.list() == []


async def test_it_is_not_started_again_while_its_agents_still_end(
    monkeypatch: pytest.MonkeyPatch, host: subprocess.Popen[bytes]
) -> None:
    record = saved(host)
    agent = record.folder / "a0"
    agent.mkdir()
    told = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    (agent / "agent.json").write_text(json.dumps(told))
    pool = ClusterPool(os.getpid(), 10)
    await pool.restore()

    async def look() -> None:
        [listed] = await pool.list()
        assert listed.state == "stopping"
        with pytest.raises(NotFound):
            await pool.agents()  # the newest one that stays

    await stopped_while(monkeypatch, pool, host, look)
    assert not record.folder.exists()


async def test_another_one_that_has_its_name_by_then_stays(
    monkeypatch: pytest.MonkeyPatch, host: subprocess.Popen[bytes]
) -> None:
    saved(host)
    pool = ClusterPool(os.getpid(), 10)
    await pool.restore()
    with stand_in() as other:

        async def look() -> None:
            await pool.list()
            saved(other, "c2")
            await pool.restore()

        await stopped_while(monkeypatch, pool, host, look)
        assert pool.log("mine")[0].cluster_id == "c2"


async def test_one_that_could_not_be_stopped_is_there_as_before(
    monkeypatch: pytest.MonkeyPatch, host: subprocess.Popen[bytes]
) -> None:
    record = saved(host)
    pool = ClusterPool(os.getpid(), 10)
    await pool.restore()

    async def stop(*_: object) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr(HostProcesses, "stop", stop)
    with pytest.raises(PermissionError):
        await pool.stop("mine")
    assert pool.log("mine")[0].state == record.state
