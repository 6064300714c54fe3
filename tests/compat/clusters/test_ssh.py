"""Kind ssh against a real sshd: scheduler and workers are started over SSH, a world spans two of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.world.test_world_two_hosts import SUM
from tests.support.clusters import Server
from tests.support.sshd import Sshd, sshd
from tests.support.worlds import until

pytest.importorskip("asyncssh", reason="pip install asyncssh")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path) as running:
        yield running


def test_a_world_over_two_workers_that_were_started_over_ssh_computes_stops_and_keeps_its_variables(
    login: Sshd, server: Server
) -> None:
    options = {
        "hosts": ["127.0.0.1"] * 3,  # the first is the scheduler's
        "connect_options": login.connect_options,
        "worker_options": {"nthreads": 1},
        "scheduler_options": {"port": 0, "dashboard_address": "127.0.0.1:0"},
        "remote_python": sys.executable,
        "slots": 1,
    }
    server.do(server.pool.start("ssh", "far", None, options))
    until(lambda: len(server.agents()) == 2, "both workers are there", 60)
    world = server.world(2)
    assert world.ok("kept = rank\n" + SUM).results() == ["2", "2"]
    running = world.send("print('in it')\n" + SUM.replace("int(t)", "while True: dist.all_reduce(t)"))
    outcome = running.wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped"
    assert world.ok("kept").results() == ["0", "1"]
    world.end()
