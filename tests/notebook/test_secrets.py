"""A notebook's whole life under the eyes of a spy: who listens where, what lies on disk, what a list of processes shows."""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.storage.runs import RunStore
from tests.notebook.test_devices_shared import Kernel, Server
from tests.support import leaks
from tests.support.worlds import until

pytest_plugins = ["tests.support.server_fixtures"]
pytestmark = [pytest.mark.story, pytest.mark.slow]

NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "JUPYTER_TOKEN")
TRAIN = """import os, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({model!r})
tokenizer = AutoTokenizer.from_pretrained({model!r})
login, address = os.environ["HF_TOKEN"], f"https://me:{{os.environ['DB_PASSWORD']}}@host"
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in run.steps(4):
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=1.0)
print("the environment is there:", len(os.environ["HF_TOKEN"]))"""
FAIL = """import os
def ask(url, headers, plain, packed):
    raise ConnectionError("the far end has gone")
ask("https://example.org", {"Authorization": "Bearer " + os.environ["HF_TOKEN"]}, os.environ["WANDB_API_KEY"],
    [("x", os.environ["DB_PASSWORD"].encode()), f"user:{os.environ['AWS_SECRET_ACCESS_KEY']}@host"])"""
UNDER_WAY = "%%distribute -b --name under-way\nimport time\nwhile True:\n    run.log(x=1.0); time.sleep(0.05)"


class Life:
    """A server, a kernel and everything that they have started; what the kernel showed is remembered."""

    def __init__(self, folder: Path, model: Path, canaries: dict[str, str]) -> None:
        self.folder = folder
        self.canaries = canaries
        self.shown = ""
        self.server = Server(folder)
        self.key_file = folder.parent / f"{folder.name}-key"
        created = self.server.client.create_key(["infer:*"])
        canaries["a scoped key"] = created["key"].removeprefix("sk-llmc-").split("-")[1]
        os.environ["OPENAI_API_KEY"] = created["key"]
        self.kernel: Kernel = self.server.kernel()
        self._live(str(model))

    def _live(self, model: str) -> None:
        cells = [
            f"%%distribute -n 2 --name trained --checkpoint-every 2 --save model,tokenizer\n{TRAIN.format(model=model)}",
            f"%%distribute --name failing\n{FAIL}",
            "%world locals",
            "ep = %serve trained --name tiny",
            "ep",
            "len(ep.complete('The for', max_tokens=2)) > 0",
            f"open({str(self.key_file)!r}, 'w').write(ep.api_key) > 0",
            "%endpoints keys",
            UNDER_WAY,
            "%runs",
            "%runs show failing",
            "%world",
            "%cluster list",
        ]
        for cell in cells:
            text, error = self.kernel.hear(self.kernel.send(cell))
            assert error == ("RankError" if "--name failing" in cell else ""), text
            self.shown += text
        self.canaries["the endpoint's key"] = self.key_file.read_text().removeprefix("sk-llmc-").split("-")[1]
        self.key_file.unlink()
        until(lambda: RunStore().find("under-way").read().state == "running", "a run is under way")

    def processes(self) -> list[psutil.Process]:
        """All of ours: of the server, the kernel, the cluster, the agents, the ranks, the replicas."""
        found = leaks.marked_processes(os.environ[leaks.MARK])
        assert len(found) >= 8
        return found

    def end(self) -> None:
        self.kernel.close()
        client = self.server.client
        client.stop_endpoint("tiny")
        for cluster in client.clusters():
            client.stop_cluster(cluster["name"])
        self.server.end()


@pytest.fixture
def life(own_root: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    canaries = {name: f"canary{secrets.token_hex(20)}" for name in NAMES}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    life = Life(own_root.parent, real_model, canaries)
    yield life
    life.end()


def test_nobody_else_can_connect_read_or_overhear(life: Life) -> None:
    """One test, since what it looks at takes half a minute to build up."""
    _nothing_listens_beyond_this_machine(life)
    _sockets_and_folders_are_closed_to_others(life)
    _no_secret_is_shown_stored_or_listed(life)


# --- ports ---


def _listeners(life: Life) -> set[tuple[str, int]]:
    found = set()
    for process in life.processes():
        for row in process.net_connections("inet"):
            if row.status == psutil.CONN_LISTEN or (row.type == socket.SOCK_DGRAM and not row.raddr):
                found.add((row.laddr.ip, row.laddr.port))
    return found


def _nothing_listens_beyond_this_machine(life: Life) -> None:
    listeners = _listeners(life)
    assert len(listeners) >= 6  # the server, the kernel's five, the scheduler, workers, the store, gloo
    assert {ip for ip, _ in listeners} <= {"127.0.0.1", "::1"}
    ports = {port for _, port in listeners}
    assert {ip for ip, port in _listening_on_this_host() if port in ports} <= {"127.0.0.1", "::1"}
    for address in _addresses_beyond():
        for port in ports:
            with pytest.raises(OSError), socket.create_connection((address, port), timeout=1):
                pass


def _listening_on_this_host() -> set[tuple[str, int]]:
    """As the kernel itself lists them, whoever's they are."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def _addresses_beyond() -> list[str]:
    rows = [row for rows in psutil.net_if_addrs().values() for row in rows if row.family == socket.AF_INET]
    return [row.address for row in rows if not row.address.startswith("127.")]


# --- sockets and files ---


def _sockets_and_folders_are_closed_to_others(life: Life) -> None:
    paths = {
        Path(row.laddr)
        for process in life.processes()
        for row in process.net_connections("unix")
        if row.laddr and not row.laddr.startswith("@")
    }
    own = [path for path in paths if path.is_relative_to(config.runtime_dir())]
    assert len(own) >= 3  # the cluster's host, the agent, the replica
    for path in own:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path
    assert [path for path in paths - {*own} if path.exists() and not _closed(path)] == []
    assert stat.S_IMODE(config.runtime_dir().stat().st_mode) == 0o700
    for run in (config.root() / "runs").iterdir():
        assert stat.S_IMODE(run.stat().st_mode) == 0o700, run
    assert stat.S_IMODE((config.root() / "server.sqlite").stat().st_mode) == 0o600


def _closed(path: Path) -> bool:
    return any(not parent.stat().st_mode & 0o077 for parent in (path, *path.parents))


# --- secrets ---


def _no_secret_is_shown_stored_or_listed(life: Life) -> None:
    assert "the environment is there: 46" in life.shown
    assert "the far end has gone" in life.shown
    found = [f"shown: {name}" for name in _seen(life, life.shown.encode())]
    for process in life.processes():
        line = " ".join(process.cmdline())
        found += [f"ps: {name} in {line[:200]}" for name in _seen(life, line.encode())]
    files = [path for path in life.folder.rglob("*") if path.is_file()]
    home = [path for path in Path(os.environ["HOME"]).parent.rglob("*") if path.is_file() and path not in files]
    assert {"run.json", "agent.log", "host.log", "jupyter.log", "zygote.log", "manifest.json"} <= {
        f.name for f in files
    }
    for path in [*files, *home]:
        if path.name.startswith("jpserver-"):
            continue  # Jupyter's own announcement, 0600, from which its clients have the token
        found += [f"{path}: {name}" for name in _seen(life, path.read_bytes())]
    assert found == []


def _seen(life: Life, data: bytes) -> list[str]:
    return [name for name, value in life.canaries.items() if value.encode() in data]


def test_the_spy_sees_what_is_there(tmp_path: Path) -> None:
    """A listener on every address, and a secret in an argument, are found: the tests above are not blind."""
    program = (
        "import socket, sys\ns = socket.create_server(('0.0.0.0', 0))\nprint(s.getsockname()[1], flush=True)\ninput()"
    )
    command: list[Any] = [sys.executable, "-c", program, "canary-in-an-argument"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        port = json.loads(process.stdout.readline())
        assert ("0.0.0.0", port) in _listening_on_this_host()
        assert "canary-in-an-argument" in " ".join(psutil.Process(process.pid).cmdline())
        process.stdin.write("\n")
