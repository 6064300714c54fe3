"""Agents of a local cluster begin ahead of its Dask workers, once each, and none stays without a cluster."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.cluster import agent_launcher
from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.cluster.factory import starts_here
from jupyter_llmcloud.cluster.record import cluster_folder
from jupyter_llmcloud.errors import WorldError
from tests.support.worlds import alive, until


def agents_below(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "jupyter_llmcloud.agent" in command and any(part.startswith(str(folder)) for part in command):
            found.append(process.pid)
    return found


@pytest.mark.story
async def test_a_cluster_takes_over_the_agents_that_were_started_ahead_of_it():
    agent_launcher.start_ahead("beefcafe", 1)
    begun = until(lambda: agents_below(cluster_folder("beefcafe")), "it has become the agent's program")
    pool = ClusterPool(os.getpid(), 60.0, begun_cluster_id="beefcafe")
    try:
        record, second = await asyncio.gather(pool.start(workers=2), pool.start(name="second", workers=1))
        assert record.cluster_id == "beefcafe"
        known = [json.loads(path.read_text())["pid"] for path in record.folder.glob("a*/agent.json")]
        assert len(begun) == 1 and begun[0] in known
        assert sorted(known) == sorted(agents_below(record.folder)) and len(known) == 2
        assert second.cluster_id != "beefcafe"
    finally:
        await pool.close()
    assert agents_below(cluster_folder("beefcafe")) == []


def test_who_comes_while_an_agent_comes_up_waits_for_that_one(tmp_path):
    async def twice():
        return await asyncio.gather(*(agent_launcher.ensure_agent(tmp_path, "0", "127.0.0.1", 2) for _ in range(2)))

    first, second = asyncio.run(twice())
    assert first["pid"] == second["pid"]
    os.kill(first["pid"], signal.SIGTERM)
    until(lambda: not alive(first["pid"]), "the agent has ended")


def test_an_agent_that_ends_at_its_start_is_told_with_its_last_words(tmp_path):
    with pytest.raises(WorldError, match="slots"):
        asyncio.run(agent_launcher.ensure_agent(tmp_path, "0", "127.0.0.1", -1))


@pytest.mark.parametrize(
    ("kind", "options", "here"),
    [
        ("local", {}, True),
        ("local", {"slots": 4}, True),
        ("local", {"slots": 0}, False),
        ("local", {"slots": "many"}, False),
        ("local", {"host": "10.0.0.1"}, False),
        ("slurm", {}, False),
    ],
)
def test_only_a_plain_local_cluster_has_its_agents_started_ahead(kind, options, here):
    assert starts_here(kind, options) is here


def test_a_headless_server_that_was_asked_for_a_world_in_vain_leaves_no_agent(own_root, tmp_path):
    announced = tmp_path / "headless.json"
    command = [sys.executable, "-m", "jupyter_llmcloud.server.headless", "--owner-pid", str(os.getpid())]
    server = subprocess.Popen([*command, "--announce", str(announced), "--for-world"], start_new_session=True)
    try:
        until(announced.exists, "the server is up")
        (agent,) = agents_below(config.runtime_dir() / "c")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    until(lambda: not alive(agent), "its agent has ended")
