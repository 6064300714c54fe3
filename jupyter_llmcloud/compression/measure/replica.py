"""A model as an endpoint serves it: the process of a replica, asked as a client would."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.model_folder import ModelLayout
from jupyter_llmcloud.system.spawn import log_tail, spawn

_READY_S = 600.0
_ASK_S = 600.0
_POLL_S = 0.1
_END_S = 10.0


class MeasuredReplica:
    """One replica, from the start until the end of the block. Raises ModelError when the model cannot be served.

    Args:
        layout: of the model.
        num_threads: of its engine.
    """

    def __init__(self, layout: ModelLayout, num_threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-")
        self._log = Path(self._folder.name) / "log"
        self._token = secrets.token_hex(16)
        self._spec = {
            "endpoint": "measured",
            "model": str(layout.adapter or layout.folder),
            "base_model": str(layout.folder) if layout.adapter else "",
            "socket": str(Path(self._folder.name) / "s"),
            "token": self._token,
            "served_name": "measured",
            "num_threads": num_threads,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.details: dict[str, Any] = {}

    def __enter__(self) -> MeasuredReplica:
        command = [sys.executable, "-m", "jupyter_llmcloud.inference"]
        self._process = spawn(command, self._log, takes_input=True, env=dict(os.environ))
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._spec).encode() + b"\n")
        self._process.stdin.flush()  # it stays open: its end would end the replica
        transport = httpx.HTTPTransport(uds=self._spec["socket"])
        self._client = httpx.Client(
            transport=transport,
            base_url="http://replica",
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=_ASK_S,
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            told = self._readiness()
            if told.get("state") == "ready":
                self.details = told
                return
            if told.get("state") == "failed":
                raise ModelError(f"it cannot be served: {told.get('reason')}")
            if self._process is None or self._process.poll() is not None:
                raise ModelError(f"it cannot be served: its process ended. {log_tail(self._log)}")
            time.sleep(_POLL_S)
        raise ModelError(f"it was not ready to be served after {_READY_S:g} s.")

    def _readiness(self) -> dict[str, Any]:
        try:
            return dict(self._client.get("/readyz").json())
        except (httpx.TransportError, ValueError):
            return {}

    def complete(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """The whole answer to POST /v1/completions. Raises ModelError when it is refused."""
        reply = self._client.post("/v1/completions", json={"model": "measured", "prompt": prompts, **options})
        if reply.status_code != 200:
            raise ModelError(f"its endpoint refuses: {reply.text[:500]}")
        return dict(reply.json())

    def stream(self, prompt: list[int], **options: Any) -> tuple[float, float]:
        """Seconds from a request to its first token, and to its last one."""
        body = {"model": "measured", "prompt": prompt, "stream": True, **options}
        began = time.perf_counter()
        first = 0.0
        with self._client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                raise ModelError(f"its endpoint refuses: {reply.read()[:500]!r}")
            for line in reply.iter_lines():
                if line.startswith("data: {") and not first:
                    first = time.perf_counter() - began
        return first, time.perf_counter() - began

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most that the process has held, where the system tells it."""
        assert self._process is not None
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            try:
                return int(psutil.Process(self._process.pid).memory_info().rss)
            except psutil.Error:
                return None

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._client.close()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()
