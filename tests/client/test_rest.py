"""The REST API from a kernel: finding the server, errors by their class, the headless server and its end."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jupyter_llmcloud import config, errors
from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.rest import ServerClient, is_loopback
from tests.support.server_parts import Server
from tests.support.worlds import until

pytest_plugins = ["tests.support.server_fixtures"]

OWNER = """
import sys
from jupyter_llmcloud.client import discovery
client = discovery.find_or_start()
again = discovery.find_or_start()
print(client.status()["pid"], client.url == again.url, client.status()["headless"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(own_root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has started a headless server, and ends when its standard input does."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def wait_until_gone(pid: int, deadline_s: float = 20) -> None:
    deadline = time.monotonic() + deadline_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} stays"
        time.sleep(0.05)


def test_a_kernel_without_a_jupyter_server_gets_a_headless_one_that_goes_with_it(
    owner: subprocess.Popen[str], own_root: Path
) -> None:
    pid, same, headless = owner.stdout.readline().split()
    assert (same, headless) == ("True", "True")
    server = psutil.Process(int(pid))
    [path] = config.runtime_dir().glob("headless-*.json")
    assert path.stat().st_mode & 0o077 == 0
    token = json.loads(path.read_text())["token"]
    assert all(token not in argument for argument in server.cmdline())
    assert os.getsid(server.pid) == server.pid
    assert {connection.laddr.ip for connection in server.net_connections() if connection.status == "LISTEN"} == {
        "127.0.0.1"
    }
    owner.kill()
    wait_until_gone(server.pid)
    assert list(config.runtime_dir().glob("headless-*")) == []


KILLED = """
import os, signal, time
from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.magics.session.session import Session
session = Session()
first = session.server
pid = first.status()["pid"]
os.kill(pid, signal.SIGKILL)
while not discovery.has_ended(first):
    time.sleep(0.01)
second = session.server
print(second.status()["headless"], pid != second.status()["pid"], second is session.server, flush=True)
"""


def test_a_kernel_whose_headless_server_was_killed_starts_another(own_root: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED], check=False, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True", "True", "True"], ran.stderr


WITHOUT_DASK = """
import sys
sys.modules["jupyter_llmcloud.cluster.clusters"] = None  # cannot be imported
from jupyter_llmcloud.server.headless.__main__ import main
main()
"""


def test_a_headless_server_ends_with_its_owner_also_when_it_could_not_make_clusters(own_root: Path) -> None:
    owner = subprocess.Popen(["sleep", "1000"])
    path = own_root / "announced.json"
    arguments = ["--owner-pid", str(owner.pid), "--announce", str(path)]
    server = subprocess.Popen([sys.executable, "-c", WITHOUT_DASK, *arguments])
    try:
        until(path.exists, "the server is up")
        told = json.loads(path.read_text())
        with pytest.raises(errors.LLMCloudError):
            ServerClient(told["url"], told["token"]).ask("GET", "clusters")
        owner.kill()
        owner.wait()
        server.wait(20)
    finally:
        for process in (owner, server):
            process.kill()
            process.wait()


def test_a_headless_server_answers_nothing_but_our_routes(owner: subprocess.Popen[str]) -> None:
    import httpx

    owner.stdout.readline()
    [path] = config.runtime_dir().glob("headless-*.json")
    told = json.loads(path.read_text())
    for route in ("api/kernels", "api/contents", "api/terminals", "api/sessions", "lab", "tree"):
        answer = httpx.get(told["url"] + route, headers={"Authorization": f"token {told['token']}"}, trust_env=False)
        assert answer.status_code == 404, route


def test_a_server_that_the_environment_names_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCLOUD_SERVER_URL", "http://127.0.0.1:9/")
    with pytest.raises(errors.ServerError, match=r"127\.0\.0\.1:9.*LLMCLOUD_SERVER_URL.*LLMCLOUD_SERVER_TOKEN"):
        discovery.find_or_start()


async def test_the_environment_names_the_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCLOUD_SERVER_URL", server.url)
    monkeypatch.setenv("LLMCLOUD_SERVER_TOKEN", server.token)
    client = await asyncio.to_thread(discovery.find_or_start)
    assert client.url == f"{server.url}/"
    client.close()


async def test_the_parent_jupyter_server_is_found_by_its_pid(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JPY_PARENT_PID", "4321")
    told = {"url": f"{server.url}/", "token": server.token, "pid": 4321}
    (tmp_path / "jpserver-4321.json").write_text(json.dumps(told))
    client = await asyncio.to_thread(discovery.parent_server)
    assert client is not None and client.url == f"{server.url}/"
    client.close()


async def test_under_jupyterhub_the_kernels_own_token_opens_the_parent(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JPY_PARENT_PID", "4321")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", server.token)
    (tmp_path / "jpserver-4321.json").write_text(json.dumps({"url": f"{server.url}/", "token": ""}))
    client = await asyncio.to_thread(discovery.parent_server)
    assert client is not None
    client.close()


@pytest.mark.parametrize("written", ["", "{", "[]", '{"url": "http://127.0.0.1:9/", "token": "x"}'])
def test_a_parent_that_does_not_answer_is_no_server(
    written: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JPY_PARENT_PID", "4321")
    (tmp_path / "jpserver-4321.json").write_text(written)
    assert discovery.parent_server() is None


async def test_an_error_of_the_api_is_raised_as_the_class_it_names(server: Server, model: Path) -> None:
    client = ServerClient(server.url, server.token)

    def ask() -> None:
        client.create_endpoint(str(model), name="tiny")
        with pytest.raises(errors.NameTaken, match="'tiny'"):
            client.create_endpoint(str(model), name="tiny")
        with pytest.raises(errors.NotFound, match="'nothing'"):
            client.run("nothing")
        with pytest.raises(errors.CapacityError, match="4 ranks"):
            client.place(None, 9)
        with pytest.raises(errors.ServerError, match="403"):
            ServerClient(server.url, "wrong").status()
        with pytest.raises(errors.ServerError, match="404"):
            ServerClient(f"{server.url}/elsewhere", server.token).status()
        with pytest.raises(errors.ConnectionLost, match=r"127\.0\.0\.1:9"):
            ServerClient("http://127.0.0.1:9", "x").status()

    await asyncio.to_thread(ask)
    client.close()


async def test_every_route_has_a_method(server: Server, model: Path) -> None:
    from tests.server.test_server_routes import make_run

    client = ServerClient(server.url, server.token)
    make_run()
    make_run("active", "running", agent=server.agent.address)

    def ask() -> None:
        assert client.start_cluster("local", name="c1", workers=2)["name"] == "c1"
        assert client.connect_cluster("tcp://x:1", name="c2")["kind"] == "connected"
        assert client.scale_cluster("c1", 3)["num_workers"] == 3
        client.stop_cluster("c1")
        assert [row["name"] for row in client.clusters()] == ["c2"]
        assert client.place(None, 2)["num_ranks"] == 2
        assert {row["name"] for row in client.runs()} == {"train", "active"}
        assert [row["name"] for row in client.runs(state="active", limit=1)] == ["active"]
        assert client.run("train")["run_id"] == "train-1"
        assert len(client.run_logs("train", rank=0, limit=3)) == 3
        assert len(client.run_metrics("train")) == 4
        assert client.stop_run("active")["state"] == "stopping"
        client.delete_run("train")
        assert client.create_endpoint(str(model), name="tiny")["state"] == "starting"
        assert client.endpoint("tiny", wait_s=20)["state"] == "ready"
        assert [row["name"] for row in client.endpoints()] == ["tiny"]
        assert client.endpoint_logs("tiny", limit=1)
        key = client.create_key(["infer:*"], expires_s=60, label="x")
        client.revoke_key(key["id"])
        assert client.keys()[0]["state"] == "revoked"
        assert client.stop_endpoint("tiny")["state"] == "stopped"

    await asyncio.to_thread(ask)
    client.close()


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:1/", True),
        ("http://[::1]:1/", True),
        ("http://localhost/x", True),
        ("https://hub.org/", False),
    ],
)
def test_only_a_server_elsewhere_is_asked_through_a_proxy(url: str, local: bool) -> None:
    assert is_loopback(url) is local


def test_finding_the_server_imports_neither_tornado_nor_torch() -> None:
    code = "import sys, jupyter_llmcloud.client.discovery as f; print([m for m in %r if m in sys.modules])"
    heavy = ("torch", "distributed", "tornado", "jupyter_server", "IPython")
    done = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
