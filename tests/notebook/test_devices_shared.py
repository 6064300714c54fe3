"""One Jupyter server, two notebooks, one set of devices; then the server is killed while a run trains."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import httpx
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import find_connection_file

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.storage.runs import RunStore
from tests.server.test_server_restart import wait_for_client
from tests.support.worlds import alive, numbered_lines, until

pytestmark = pytest.mark.slow
LONG = """-b --name {name}
import os, time
i = 0
while not os.path.exists({flag!r}):
    print("line", i)
    run.log(x=i)
    i += 1
    time.sleep(0.05)"""


class Server:
    """`jupyter server`, and kernels that it starts as it does for notebooks."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.port=0"]
        with (folder / "jupyter.log").open("ab") as log:
            extension = "--ServerApp.jpserver_extensions={'jupyter_llmcloud': True}"
            self.process = subprocess.Popen([*command, extension], cwd=folder, stdout=log, stderr=log)
        path = config.jupyter_runtime_dir() / f"jpserver-{self.process.pid}.json"
        self.client: ServerClient = wait_for_client(path, self.process)

    def kernel(self, name: str = "") -> Kernel:
        """The kernel of a notebook with a name of its own; "" is one that others have too."""
        wanted = {"path": f"{secrets.token_hex(4)}.ipynb", "type": "notebook", "name": name}
        told = self._post("sessions", {**wanted, "kernel": {"name": "python3"}})
        return Kernel(told["kernel"]["id"])

    def restart(self, kernel: Kernel) -> Kernel:
        """As JupyterLab's Restart does."""
        kernel.close()
        self._post(f"kernels/{kernel.kernel_id}/restart", {})
        return Kernel(kernel.kernel_id)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"token {self.client._token}"}
        answer = httpx.post(f"{self.client.url}api/{path}", json=body, headers=headers, trust_env=False, timeout=60)
        assert answer.is_success, answer.text
        return dict(answer.json())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.client.close()


class Kernel:
    """A kernel of a server: cells in, their text out."""

    def __init__(self, kernel_id: str) -> None:
        self.kernel_id = kernel_id
        self.client = BlockingKernelClient(connection_file=find_connection_file(f"kernel-{kernel_id}.json"))
        self.client.load_connection_file()
        self.client.start_channels()
        until(self._is_ready, "the kernel answers", 60)
        self.pid = int(self.run("import os; os.getpid()"))
        self.run("%load_ext jupyter_llmcloud")

    def _is_ready(self) -> bool:
        try:
            self.client.wait_for_ready(timeout=20)
        except RuntimeError:  # on a busy machine a kernel that has not begun yet is taken for dead
            return False
        return True

    def send(self, code: str) -> str:
        return str(self.client.execute(code))

    def hear(self, message_id: str, until_text: str = "", timeout_s: float = 60) -> tuple[str, str]:
        """(text, name of the error) of a cell, when it has ended or as soon as it has shown `until_text`."""
        text, error = "", ""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                message: dict[str, Any] = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            except Empty:
                pytest.fail(f"waited {timeout_s:g} s in vain for {until_text or 'the end of the cell'!r}: {text}")
            content = message["content"]
            if message["parent_header"].get("msg_id") != message_id:
                continue
            match message["msg_type"]:
                case "stream":
                    text += content["text"]
                case "execute_result":
                    text += content["data"]["text/plain"]
                case "error":
                    error = content["ename"]
                    text += re.sub(r"\x1b\[[\d;]*m", "", "\n".join(content["traceback"]))
                case "status" if content["execution_state"] == "idle":
                    return text, error
            if until_text and until_text in text:
                return text, error

    def run(self, code: str) -> str:
        text, error = self.hear(self.send(code))
        assert not error, text
        return text

    def interrupt(self) -> None:
        """As Jupyter's Stop does."""
        os.killpg(os.getpgid(self.pid), signal.SIGINT)

    def kill(self) -> None:
        os.killpg(os.getpgid(self.pid), signal.SIGKILL)
        self.close()

    def close(self) -> None:
        self.client.stop_channels()


@pytest.fixture
def folder(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LLMCLOUD_LEASE_S", "3")
    yield own_root.parent


@pytest.mark.story
def test_two_notebooks_share_devices_and_a_run_outlives_the_server_that_started_it(folder: Path) -> None:
    server, flag = Server(folder), folder / "end"
    try:
        first, second = server.kernel(""), server.kernel("")
        first.run("%cluster start local --workers 1 slots=2")
        first.run(f"%%distribute -n 2 {LONG.format(name='first', flag=str(flag))}")

        _the_second_waits_visibly_and_stop_works_while_it_waits(second)
        waiting = second.send("%%distribute -n 2 --name second\nprint('mine at last')")
        second.hear(waiting, "Waiting for free slots")
        first.run("%runs stop first")
        assert RunStore().find("first").read().state in ("stopping", "stopped")
        first.run("%world stop")
        text, error = second.hear(waiting)
        assert (error, "mine at last" in text) == ("", True), text

        _what_a_crashed_kernel_held_comes_back_with_its_lease(first, second)
        first.run(f"%%distribute -n 2 {LONG.format(name='survivor', flag=str(flag))}")
        until(lambda: _num_lines("survivor") > 20, "the survivor has begun")
        [cluster] = server.client.clusters()
        server.kill()
        until(lambda: not alive(first.pid), "a kernel ends with its server", 30)
        first.close()
    finally:
        server.kill()
    before = _num_lines("survivor")
    server = Server(folder)
    try:
        assert [(row["name"], row["state"]) for row in server.client.runs(limit=1)] == [("survivor", "running")]
        assert [known["name"] for known in server.client.clusters()] == [cluster["name"]]
        third = server.kernel("third.ipynb")
        table = third.run("%runs")
        assert re.search(r"survivor-\S+ +survivor +running", table), table
        attached = third.send("%runs attach survivor")
        until(lambda: _num_lines("survivor") > before + 40, "the survivor trains on")
        flag.touch()
        shown, error = third.hear(attached)
        assert not error, shown
        seen = numbered_lines(shown)
        assert seen == {rank: [*range(_num_lines("survivor", rank))] for rank in (0, 1)}
        assert RunStore().find("survivor").read().state == "finished"
        _a_restarted_kernel_finds_its_ranks_and_the_cluster(server, third, cluster["name"])
        server.client.stop_cluster(cluster["name"])
    finally:
        server.end()


def _the_second_waits_visibly_and_stop_works_while_it_waits(second: Kernel) -> None:
    waiting = second.send("%%distribute -n 2 --name never\n1")
    text, _ = second.hear(waiting, "Waiting for free slots")
    assert re.search(r"0 of 2 slots are free, the others hold .*world", text), text
    pressed = time.monotonic()
    second.interrupt()
    text, error = second.hear(waiting)
    assert error == "KeyboardInterrupt"
    assert time.monotonic() - pressed < 2
    assert not [run for run in RunStore().list() if run.name == "never"]
    assert second.run("1 + 1") == "2"


def _what_a_crashed_kernel_held_comes_back_with_its_lease(first: Kernel, second: Kernel) -> None:
    """The second holds all slots in an idle world; its kernel is killed."""
    waiting = first.send("%%distribute -n 2 --name again\nprint('back')")
    first.hear(waiting, "Waiting for free slots")
    killed = time.monotonic()
    second.kill()
    text, error = first.hear(waiting)
    assert (error, "back" in text) == ("", True), text
    assert time.monotonic() - killed < 15


def _a_restarted_kernel_finds_its_ranks_and_the_cluster(server: Server, kernel: Kernel, cluster: str) -> None:
    kernel.run("os.environ['LLMCLOUD_LEASE_S'] = '60'")  # the time that a restart may take
    kernel.run("%world stop" if "idle" in kernel.run("%world") else "1")
    kernel.run("%%distribute -n 2\nkept = rank + 40")
    kernel = server.restart(kernel)
    text = kernel.run("%%distribute\nkept")
    assert "was still there" in text
    assert sorted(line for line in text.splitlines() if "Out" in line) == ["Out[0]: 40", "Out[1]: 41"]
    assert cluster in kernel.run("%cluster list")
    kernel.run("%world stop")
    kernel.close()


def _num_lines(name: str, rank: int = 0) -> int:
    records = RunStore().find(name).records("logs")
    return sum(record.get("text", "").count("line") for number, record in records if number == rank)
