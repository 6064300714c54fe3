"""%cluster connect to what is no Dask scheduler: the reason within five seconds, never an internal error."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import Scheduler, Security, Worker

from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.cluster.kinds.gateway import cluster_name
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, NameTaken, UsageError
from tests.support.notebook_server import notebook_server

WITHIN_S = 5.0


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where a server does this with every connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    with contextlib.suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in kept:
            connection.close()


def silent(_: socket.socket) -> None:
    """Says nothing."""


@contextlib.contextmanager
def http_server() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join(5)
    server.server_close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def refused(address: str) -> LLMCloudError:
    """How an address is refused, in time."""

    async def connect() -> None:
        await ClusterPool(0, 1.0).connect(address, "mine")

    began = time.monotonic()
    with pytest.raises(LLMCloudError) as caught:
        asyncio.run(connect())
    assert time.monotonic() - began < WITHIN_S
    assert address in str(caught.value)
    return caught.value


@pytest.mark.usefixtures("own_root")
@pytest.mark.parametrize("scheme", ["tcp://", ""])
def test_a_port_where_nothing_listens_is_named(scheme: str) -> None:
    error = refused(f"{scheme}127.0.0.1:{closed_port()}")
    assert isinstance(error, ConnectionLost) and "nothing listens on that port" in str(error)


@pytest.mark.usefixtures("own_root")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (silent, "says nothing"),
        (lambda connection: connection.close(), "closes the connection at once"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n"), "another kind of server.*SSH-2.0"),
        (lambda connection: connection.sendall(b"\x10\0\0\0\0\0\0\0"), "does not finish Dask's handshake"),
        (lambda connection: connection.sendall(b"\x10\0\0\0\0\0\0\0" + bytes(16)), "no Dask scheduler answers"),
        (lambda connection: connection.sendall(b"\xff" * 8), "another kind of server"),
    ],
)
def test_what_speaks_another_language_is_told(answer: Callable[[socket.socket], None], words: str) -> None:
    with listening(answer) as port, pytest.raises(ConnectionLost, match=words):
        raise refused(f"tcp://127.0.0.1:{port}")


@pytest.mark.usefixtures("own_root")
def test_a_web_server_is_called_one_and_a_dashboards_url_is_no_address() -> None:
    with http_server() as port:
        assert "an HTTP server does" in str(refused(f"tcp://127.0.0.1:{port}"))
        error = refused(f"http://127.0.0.1:{port}/status")
    assert isinstance(error, UsageError) and "dashboard" in str(error)


@pytest.mark.usefixtures("own_root")
@pytest.mark.parametrize("address", ["tcp://no-such-host.invalid:8786", "tcp://127.0.0.1", "nonsense://x:1", "x y", ""])
def test_what_is_no_address_or_no_host_is_refused_by_name(address: str) -> None:
    assert "no Dask scheduler" in str(refused(address)) or "no address of a Dask scheduler" in str(refused(address))


@pytest.mark.usefixtures("own_root")
def test_a_connected_cluster_that_has_gone_hides_no_other_and_can_be_forgotten() -> None:
    async def look() -> tuple[list[tuple[str, str, str]], list[str]]:
        async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
            places = {"alive": scheduler.address, "gone": f"tcp://127.0.0.1:{closed_port()}"}
            for name, address in places.items():
                ClusterRecord(name, name, "connected", address=address, state="running").save()
            pool = ClusterPool(0, 1.0)
            await pool.restore()  # as a server does that was started again
            listed = sorted((one.name, one.state, one.reason) for one in await pool.list())
            assert await pool.worlds() == []
            await pool.stop("gone")
            left = [one.name for one in await pool.list()]
            await pool.release()
        return listed, left

    began = time.monotonic()
    (alive, gone), left = asyncio.run(look())
    assert time.monotonic() - began < 4 * WITHIN_S
    assert alive == ("alive", "running", "") and left == ["alive"]
    assert gone[:2] == ("gone", "failed") and "nothing listens" in gone[2] and "%cluster stop gone" in gone[2]


@pytest.mark.usefixtures("own_root")
def test_a_scheduler_with_tls_and_a_worker_are_told_apart_from_a_scheduler() -> None:
    async def try_both() -> tuple[str, str]:
        secure, pool = Security.temporary(), ClusterPool(0, 1.0)
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", security=secure) as hidden,
            Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler,
            Worker(scheduler.address, host="127.0.0.1") as worker,
        ):
            said = []
            for address in (hidden.address.replace("tls://", "tcp://"), worker.address):
                with pytest.raises(ConnectionLost) as caught:
                    await pool.connect(address)
                said.append(str(caught.value))
        return said[0], said[1]

    tls, worker = asyncio.run(try_both())
    assert "speaks TLS" in tls and "tls://" in tls
    assert "a Dask Worker does" in worker


@pytest.mark.story
@pytest.mark.slow
def test_a_notebook_shows_one_line_and_a_name_that_is_taken_is_refused(own_root: Path, tmp_path: Path) -> None:
    with notebook_server(tmp_path / "project") as server, http_server() as web, listening(silent) as quiet:
        notebook = server.open("a.ipynb")
        notebook.ok("%cluster start --name mine")
        for port, words in {
            closed_port(): "nothing listens",
            web: "an HTTP server does",
            quiet: "says nothing",
        }.items():
            began = time.monotonic()
            shown = notebook.run(f"%cluster connect tcp://127.0.0.1:{port}")
            assert time.monotonic() - began < WITHIN_S
            assert words in shown.error and "Internal" not in shown.error and "Traceback" not in shown.error
            assert len(shown.error.splitlines()) == 1
        assert NameTaken.__name__ in notebook.run(f"%cluster connect tcp://127.0.0.1:{quiet} --name mine").error


@pytest.mark.usefixtures("own_root")
def test_a_cluster_of_a_gateway_needs_the_gateways_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_gateway.comm", None)  # as where it is not installed
    error = refused("gateway://10.0.0.5:8786/0b2f")
    assert isinstance(error, UsageError) and "pip install dask-gateway" in str(error)


def test_a_cluster_of_a_gateway_is_named_by_its_address_or_alone() -> None:
    assert cluster_name("gateway://10.0.0.5:8786/hub/0b2f/") == cluster_name("gateway://0b2f") == "0b2f"
    for address in ("gateway://", "gateway://10.0.0.5:8786", "gateway://10.0.0.5:8786/"):
        with pytest.raises(UsageError, match="the name is missing"):
            cluster_name(address)
