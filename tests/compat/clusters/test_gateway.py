"""%cluster connect to a cluster of a real dask-gateway, behind its proxy: pip install dask-gateway dask-gateway-server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import ConnectionLost
from tests.agent.world.test_world_two_hosts import SUM
from tests.support.clusters import Server
from tests.support.worlds import until

dask_gateway = pytest.importorskip("dask_gateway", reason="pip install dask-gateway")
pytest.importorskip("dask_gateway_server", reason="pip install dask-gateway-server")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # The gateway's client closes itself again when it is collected, and its loop has ended by then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SETTINGS = """
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.SimpleAuthenticator.password = "secret"
c.DaskGateway.address = "127.0.0.1:{private}"
c.Proxy.address = "127.0.0.1:{public}"
c.Proxy.tcp_address = "127.0.0.1:{schedulers}"
c.UnsafeLocalBackend.clusters_directory = "{folder}"
c.UnsafeLocalBackend.sigint_timeout = 2
c.ClusterConfig.scheduler_cmd = ["{python}", "-m", "distributed.cli.dask_scheduler"]
c.ClusterConfig.worker_cmd = ["{python}", "-m", "distributed.cli.dask_worker", "--no-nanny"]
c.ClusterConfig.environment = {environment!r}
"""


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [int(server.getsockname()[1]) for server in servers]


@pytest.fixture
def gateway(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, which is in Dask's configuration with a user's name and password."""
    private, public, schedulers = free_ports(3)
    inherited = {name: value for name, value in os.environ.items() if name.startswith(("LLMCLOUD_", "HF_"))}
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        settings = Path(folder) / "gateway.py"
        words = {"private": private, "public": public, "schedulers": schedulers, "folder": folder}
        settings.write_text(SETTINGS.format(**words, python=sys.executable, environment=inherited))
        with (Path(folder) / "gateway.log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "dask_gateway_server", "--config", str(settings)], stdout=log, stderr=log
            )
        try:
            until(lambda: is_healthy(public), "the gateway answers behind its proxy", 60)
            monkeypatch.setenv("DASK_GATEWAY__ADDRESS", address := f"http://127.0.0.1:{public}")
            with dask_gateway_config(address, schedulers):
                yield address
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def dask_gateway_config(address: str, schedulers: int) -> object:
    import dask

    auth = {"type": "basic", "kwargs": {"username": "somebody", "password": "secret"}}
    return dask.config.set(
        {"gateway": {**dask.config.get("gateway"), "address": address, "proxy-address": schedulers, "auth": auth}}
    )


def is_healthy(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2) as answer,
    ):
        return bool(answer.status == 200)
    return False


def test_a_world_runs_on_a_cluster_of_a_gateway_which_is_left_to_whoever_started_it(
    gateway: str, server: Server
) -> None:
    with dask_gateway.Gateway() as theirs:
        cluster = theirs.new_cluster(shutdown_on_close=False)
        try:
            cluster.scale(2)
            record = server.do(server.pool.connect(cluster.scheduler_address, "behind", 1))
            assert record.address.startswith("gateway://127.0.0.1:") and record.tls
            until(lambda: len(server.agents()) == 2, "an agent is beside each worker", 120)
            world = server.world(2)
            assert world.ok(SUM).results() == ["2", "2"]
            world.end()
            with pytest.raises(ConnectionLost, match="no-such-cluster"):
                server.do(server.pool.connect("gateway://no-such-cluster", "other"))
            server.do(server.pool.stop("behind"))
            assert [each.name for each in theirs.list_clusters()] == [cluster.name]
        finally:
            theirs.stop_cluster(cluster.name)
            cluster.close()
