"""A real Jupyter server whose notebooks have kernels: opened, executed, restarted and shut down as JupyterLab does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from jupyter_client.blocking.client import BlockingKernelClient

from tests.support.lab import Lab, running_lab
from tests.support.plain_http import PLAIN
from tests.support.worlds import until


@dataclass
class Shown:
    """What a cell left below itself."""

    text: str = ""
    results: list[str] = field(default_factory=list)
    error: str = ""

    def hear(self, message: dict[str, Any]) -> None:
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                self.text += content["text"]
            case "execute_result" | "display_data" | "update_display_data":
                self.results.append(content["data"]["text/plain"])
            case "error":
                self.error = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(content["traceback"]))


class Notebook:
    """A notebook that is open, with its kernel."""

    def __init__(self, server: NotebookServer, session: dict[str, Any]) -> None:
        self._server = server
        self.session_id = session["id"]
        self.kernel_id = session["kernel"]["id"]
        self.client = self._connect()

    def _connect(self) -> BlockingKernelClient:
        path = self._server.runtime / f"kernel-{self.kernel_id}.json"
        client = BlockingKernelClient(connection_file=str(path))
        client.load_connection_file()
        client.start_channels()
        until(lambda: _is_ready(client), "the kernel answers", 60)
        client.execute_interactive("%load_ext jupyter_llmcloud", timeout=60)
        return client

    def run(self, code: str, timeout_s: float = 90) -> Shown:
        """Execute a cell and wait for its end."""
        shown = Shown()
        self.client.execute_interactive(code, timeout=timeout_s, output_hook=shown.hear)
        return shown

    def ok(self, code: str, timeout_s: float = 90) -> Shown:
        shown = self.run(code, timeout_s)
        assert not shown.error, shown.error
        return shown

    def begin(self, code: str) -> None:
        """Execute a cell and do not wait."""
        self.client.execute(code)

    def shown_so_far(self) -> Shown:
        """What has come since, of whatever cell."""
        shown = Shown()
        with contextlib.suppress(Exception):  # queue.Empty, in whatever shape the client has it
            while True:
                shown.hear(self.client.get_iopub_msg(timeout=0.2))
        return shown

    def restart(self) -> None:
        """As Lab's Restart."""
        self._server.ask("POST", f"api/kernels/{self.kernel_id}/restart")
        self.client.stop_channels()
        self.client = self._connect()

    def interrupt(self) -> None:
        """As Lab's Stop."""
        self._server.ask("POST", f"api/kernels/{self.kernel_id}/interrupt")

    def shut_down(self) -> None:
        """As Lab's Shut Down Kernel."""
        self.client.stop_channels()
        self._server.ask("DELETE", f"api/sessions/{self.session_id}")


def _is_ready(client: BlockingKernelClient) -> bool:
    """One that has just begun misses a heartbeat or two where the machine is busy, and is given up for dead."""
    with contextlib.suppress(RuntimeError):
        client.wait_for_ready(timeout=20)
        return True
    return False


class NotebookServer:
    """Asked over HTTP, with its token."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.log = lab.log
        self.folder = folder
        self.runtime = folder.parent / "lab" / "runtime"
        headers = {"Authorization": f"token {lab.token}"}
        self._http = httpx.Client(base_url=lab.url, headers=headers, timeout=90, trust_env=False, verify=PLAIN)
        self._open: list[Notebook] = []

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def open(self, name: str) -> Notebook:
        """Open a notebook, which need not be on the disk."""
        body = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}}
        self._open.append(Notebook(self, self.ask("POST", "api/sessions", body)))
        return self._open[-1]

    def worlds(self) -> list[dict[str, Any]]:
        return list(self.ask("GET", "llmcloud/api/worlds")["worlds"])

    def end(self) -> None:
        """End all clusters, whatever lease they have."""
        for notebook in self._open:
            notebook.client.stop_channels()
        for cluster in self.ask("GET", "llmcloud/api/clusters")["clusters"]:
            self.ask("DELETE", f"llmcloud/api/clusters/{cluster['name']}")
        self._http.close()

    def until_gone(self, world_id: str, timeout_s: float) -> None:
        until(lambda: world_id not in [world["world_id"] for world in self.worlds()], "the world has ended", timeout_s)


@contextlib.contextmanager
def notebook_server(folder: Path) -> Iterator[NotebookServer]:
    """A server whose notebooks are in `folder`."""
    folder.mkdir(parents=True)
    with running_lab(folder) as lab:
        server = NotebookServer(lab, folder)
        try:
            yield server
        finally:
            server.end()
