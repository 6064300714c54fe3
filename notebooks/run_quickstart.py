"""Run the quickstart inside a real Jupyter server, save the executed notebook, and print what came of it.

    python notebooks/run_quickstart.py [--steps N] [--output FILE]

It starts `jupyter server` on a random port of the loopback interface, opens a notebook session through the server's
REST API, executes the cells one by one over the kernel's websocket as a browser would, and ends everything it has
started, also when it is itself ended by a signal or by Ctrl+C. The exit status is 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import aiohttp
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import output_from_msg

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "quickstart.ipynb"
START_S = 60.0
CELL_S = 900.0
DRAW_S = 0.5  # how often the line of progress is drawn in a terminal
LINE_S = 5.0  # elsewhere there is a line for each of these
RESULTS = ("valid_loss", "bigram_loss", "answer")


class CellError(Exception):
    """A cell raised; the notebook was saved with its traceback."""


# --- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_server(home: Path, token: str) -> Iterator[str]:
    """A Jupyter server with settings and runtime files of its own under `home`; yields its URL."""
    own = {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "LLMCLOUD_ROOT": str(home / "root"),
        "LLMCLOUD_RUNTIME_DIR": str(home / "run"),
        "LLMCLOUD_LEASE_S": "10",
        "JUPYTER_TOKEN": token,
    }
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={HERE}"]
    log = home / "server.log"
    with log.open("w") as output:
        # Of a session of its own: Ctrl+C is for this program, which ends the server when nothing needs it any more.
        process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield _announced_url(process, home / "runtime", log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _announced_url(process: subprocess.Popen[bytes], runtime: Path, log: Path) -> str:
    """The URL of a server that listens: a Jupyter server announces it a moment before."""
    announcement = runtime / f"jpserver-{process.pid}.json"
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError, ConnectionError):
            told = json.loads(announcement.read_text())
            socket.create_connection(("127.0.0.1", told["port"]), timeout=START_S).close()
            return str(told["url"])
        time.sleep(0.05)
    raise RuntimeError(f"the Jupyter server did not start:\n{log.read_text()[-3000:]}")


# --- a kernel, through the server ------------------------------------------------------------------------------------


class Kernel:
    """The kernel of a notebook session, spoken to over the server's websocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, http: aiohttp.ClientSession, notebook: str) -> AsyncIterator[Kernel]:
        """Start a session for a notebook of the server; it ends with the block."""
        wanted = {"path": notebook, "name": notebook, "type": "notebook", "kernel": {"name": "python3"}}
        async with http.post("api/sessions", json=wanted) as response:
            response.raise_for_status()
            session = await response.json()
        try:
            channels = f"api/kernels/{session['kernel']['id']}/channels?session_id={session['id']}"
            async with http.ws_connect(channels, max_msg_size=0, heartbeat=30) as socket:
                yield cls(socket)
        finally:
            async with http.delete(f"api/sessions/{session['id']}"):
                pass

    async def execute(self, code: str, **options: Any) -> AsyncIterator[dict[str, Any]]:
        """Execute code; yields every message about it, the reply last, after all output."""
        identity = uuid.uuid4().hex
        header = {
            "msg_id": identity,
            "msg_type": "execute_request",
            "username": "",
            "session": identity,
            "version": "5.4",
        }
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, **options}
        await self._socket.send_json(
            {
                "header": header,
                "parent_header": {},
                "metadata": {},
                "content": content,
                "channel": "shell",
                "buffers": [],
            }
        )
        reply, idle = None, False
        while reply is None or not idle:
            message = await self._receive()
            if message["parent_header"].get("msg_id") != identity:
                continue
            if message["channel"] == "shell":
                reply = message
            elif message["msg_type"] == "status":
                idle = message["content"]["execution_state"] == "idle"
            else:
                yield message
        yield reply

    async def _receive(self) -> dict[str, Any]:
        received = await self._socket.receive(timeout=CELL_S)
        match received.type:
            case aiohttp.WSMsgType.TEXT:
                return dict(json.loads(received.data))
            case aiohttp.WSMsgType.BINARY:  # a message with buffers: its JSON part begins where the first offset says
                num_parts = int.from_bytes(received.data[:4], "big")
                begin, *rest = (
                    int.from_bytes(received.data[4 * i : 4 * i + 4], "big") for i in range(1, num_parts + 1)
                )
                return dict(json.loads(received.data[begin : rest[0] if rest else None]))
        raise CellError(f"the connection to the kernel has closed ({received.type.name})")


class Outputs:
    """The outputs of the cells of one notebook, kept as JupyterLab keeps them."""

    def __init__(self) -> None:
        self._displays: dict[str, list[NotebookNode]] = {}
        self._clear_next = False

    def add(self, cell: NotebookNode, message: dict[str, Any]) -> None:
        """Take a message of the kernel into the outputs of a cell."""
        content = message["content"]
        match message["msg_type"]:
            case "clear_output" if content["wait"]:
                self._clear_next = True
            case "clear_output":
                cell.outputs = []
            case "update_display_data":
                self._update(content)
            case "stream":
                self._clear_if_asked(cell)
                self._print(cell, content["name"], content["text"])
            case "display_data" | "execute_result" | "error":
                self._clear_if_asked(cell)
                cell.outputs.append(output_from_msg(_as_node(message)))
                self._remember(content, cell.outputs[-1])

    def _clear_if_asked(self, cell: NotebookNode) -> None:
        if self._clear_next:
            cell.outputs, self._clear_next = [], False

    def _remember(self, content: dict[str, Any], output: NotebookNode) -> None:
        if identity := content.get("transient", {}).get("display_id"):
            self._displays.setdefault(identity, []).append(output)

    def _update(self, content: dict[str, Any]) -> None:
        for output in self._displays.get(content["transient"]["display_id"], ()):
            output.data = _as_node(content["data"])
            output.metadata = _as_node(content["metadata"])

    @staticmethod
    def _print(cell: NotebookNode, name: str, text: str) -> None:
        last = cell.outputs[-1] if cell.outputs else None
        if last is None or last.output_type != "stream" or last.name != name:
            last = nbformat.v4.new_output("stream", name=name, text="")
            cell.outputs.append(last)
        last.text = _overwritten(last.text + text)


def _as_node(value: dict[str, Any]) -> NotebookNode:
    node: NotebookNode = nbformat.from_dict(value)
    return node


def _overwritten(text: str) -> str:
    """Text as it stands on a screen: what follows a carriage return takes the place of its line."""
    return re.sub(r"[^\n]*\r(?!\n|$)", "", text)


# --- the run ---------------------------------------------------------------------------------------------------------


def with_parameters(notebook: NotebookNode, **parameters: Any) -> NotebookNode:
    """Add assignments to the notebook's `parameters` cell."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


class Progress:
    """What is said while a cell is executed: how far its run is, as the server tells.

    One line that is drawn again and again where `out` is a terminal, else a line every few seconds.
    """

    def __init__(self, http: aiohttp.ClientSession, out: TextIO = sys.stdout) -> None:
        self._http = http
        self._out = out
        self._is_terminal = out.isatty()
        self._is_drawn = False
        # Of each run: (when, how far it was) when it was seen first, and when it was seen to get on last.
        self._seen: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {}

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Say it as long as the block is executed."""
        began = time.monotonic()
        saying = asyncio.ensure_future(self._say(began))
        try:
            yield
        finally:
            saying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await saying
            self._erase()

    async def _say(self, began: float) -> None:
        while True:
            await asyncio.sleep(DRAW_S if self._is_terminal else LINE_S)
            try:
                async with self._http.get("llmcloud/api/runs?state=active") as response:
                    runs = (await response.json()).get("runs", [])
            except (aiohttp.ClientError, ValueError):
                continue  # the next time
            now = time.monotonic()
            self._draw(self.line(runs[0], now) if runs else f"{now - began:.0f} s")

    def line(self, run: dict[str, Any], now: float) -> str:
        """How far a run is: `quickstart  310/1,000  31 %  ETA 3 min 2 s  loss 2.31`."""
        if run["state"] != "running":
            return f"{run['name']}  {run.get('phase') or run['state']}"
        done, total = run.get("progress") or (None, None)
        words = [str(run["name"])]
        if done is not None:
            words.append(f"{done:,.0f}/{total:,.0f}  {100 * done / total:.0f} %" if total else f"{done:,.0f}")
            if left := self._seconds_left(run["run_id"], now, done, total):
                words.append(f"ETA {_span(left)}")
        values = {name: value for name, value in (run.get("metrics") or {}).items() if value is not None}
        words += [f"{name} {value:.3g}" for name, value in list(values.items())[:3]]
        if run.get("hang"):
            words.append(run["hang"]["text"])
        return "  ".join(words)

    def _seconds_left(self, run_id: str, now: float, done: float, total: float | None) -> float | None:
        """At the pace since the run was seen first; None when that is not known yet."""
        first, last = self._seen.get(run_id, ((now, done), (now, done)))
        if done != last[1]:
            last = (now, done)
        self._seen[run_id] = (first, last)
        if not total or last[1] <= first[1]:
            return None
        pace = (last[0] - first[0]) / (last[1] - first[1])
        return max(0.0, (total - done) * pace - (now - last[0]))

    def _draw(self, line: str) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 7
            self._out.write(f"\r\x1b[K      {line[:width]}")
        else:
            self._out.write(f"      {line}\n")
        self._is_drawn = True
        self._out.flush()

    def _erase(self) -> None:
        if self._is_drawn and self._is_terminal:
            self._out.write("\r\x1b[K")
            self._out.flush()


def _span(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


async def execute(notebook: NotebookNode, kernel: Kernel, progress: Progress) -> dict[str, Any]:
    """Execute every code cell in place; raises CellError at the first that fails. Returns RESULTS."""
    outputs = Outputs()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            await _execute_cell(cell, kernel, outputs, progress)
    results: dict[str, Any] = {}
    expressions = {name: name for name in RESULTS}
    async for message in kernel.execute("", silent=True, store_history=False, user_expressions=expressions):
        results = message["content"].get("user_expressions", results)
    return {name: ast.literal_eval(value["data"]["text/plain"]) for name, value in results.items()}


async def _execute_cell(cell: NotebookNode, kernel: Kernel, outputs: Outputs, progress: Progress) -> None:
    title = next(line for line in cell.source.splitlines() if line)
    print(f"  {title[:100]}", flush=True)
    began = time.monotonic()
    cell.outputs = []
    reply: dict[str, Any] = {}
    async with progress.shown():
        async for message in kernel.execute(cell.source):
            outputs.add(cell, message)
            reply = message["content"]
    cell.execution_count = reply.get("execution_count")
    print(f"      {time.monotonic() - began:.1f} s", flush=True)
    if reply["status"] != "ok":
        trace = "\n".join(reply.get("traceback", ()))
        raise CellError(f"the cell {title!r} failed:\n{trace}\n{reply.get('ename')}: {reply.get('evalue')}")


async def end_clusters(http: aiohttp.ClientSession) -> None:
    """Clusters outlive their kernel: end them, with what runs on them."""
    async with http.get("llmcloud/api/clusters") as response:
        clusters = (await response.json()).get("clusters", [])
    for cluster in clusters:
        async with http.delete(f"llmcloud/api/clusters/{cluster['name']}"):
            pass


async def run(url: str, token: str, notebook: NotebookNode) -> dict[str, Any]:
    """Execute the notebook on a server."""
    headers = {"Authorization": f"token {token}"}
    no_limit = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, headers=headers, timeout=no_limit) as http:
        try:
            async with Kernel.open(http, NOTEBOOK.name) as kernel:
                return await execute(notebook, kernel, Progress(http))
        finally:
            await end_clusters(http)


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_in_order(number: int, frame: FrameType | None) -> None:
    """A signal leaves through all that has been begun, and ends it; whatever signal comes meanwhile does no harm."""
    for one in ENDING:
        signal.signal(one, signal.SIG_IGN)
    print(f"\n{signal.Signals(number).name}: ending what was started …", flush=True)
    raise SystemExit(128 + number)


def main() -> int:
    """0 when every cell ran."""
    for one in ENDING:
        signal.signal(one, end_in_order)
    parser = argparse.ArgumentParser(description="Run the quickstart inside a real Jupyter server.")
    parser.add_argument("--steps", type=int, help="training steps (default: the notebook's)")
    parser.add_argument("--output", type=Path, default=NOTEBOOK.with_suffix(".executed.ipynb"), help="where to save it")
    given = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if given.steps is not None:
        with_parameters(notebook, num_steps=given.steps)
    token = secrets.token_hex(24)
    began = time.monotonic()
    try:
        # Short, since a unix socket's path holds 107 bytes.
        with (
            tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as home,
            running_server(Path(home), token) as url,
        ):
            print(f"Running {NOTEBOOK.name} on {url}")
            results = asyncio.run(run(url, token, notebook))
    except CellError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        nbformat.write(notebook, given.output)
        print(f"\nThe executed notebook: {given.output}  ({time.monotonic() - began:.0f} s)")
    _report(results)
    return 0


def _report(results: dict[str, Any]) -> None:
    print(f"Validation loss:       {results['valid_loss']:.3f}")
    print(f"of the bigram model:   {results['bigram_loss']:.3f}")
    print(f"The endpoint's answer: The for statement{results['answer']}")


if __name__ == "__main__":
    sys.exit(main())
