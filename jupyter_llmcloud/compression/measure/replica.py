"""A model as an endpoint serves it: the process of a replica, asked as a client would."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import secrets
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.model_folder import ModelLayout
from jupyter_llmcloud.system.spawn import log_tail, open_log

_IMPORTED = ["torch", "transformers", "accelerate", "jupyter_llmcloud.inference.replica"]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_READY_S = 600.0
_ASK_S = 600.0
_POLL_S = 0.1
_END_S = 10.0


def prepare(num_threads: int) -> Any:
    """What replicas are forked from, with the libraries imported, as the replicas of an endpoint are."""
    os.environ.update(dict.fromkeys(_THREADS, str(num_threads)))  # read when they are imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


class MeasuredReplica:
    """One replica, from the start until the end of the block. Raises ModelError when the model cannot be served.

    Args:
        context: what `prepare` gave.
        layout: of the model.
        num_threads: of its engine.
    """

    def __init__(self, context: Any, layout: ModelLayout, num_threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-")
        self._log = Path(self._folder.name) / "log"
        token = secrets.token_hex(16)
        socket = str(Path(self._folder.name) / "s")
        spec = {
            "endpoint": "measured",
            "model": str(layout.adapter or layout.folder),
            "base_model": str(layout.folder) if layout.adapter else "",
            "socket": socket,
            "token": token,
            "served_name": "measured",
            "num_threads": num_threads,
        }
        self._alive, theirs = context.Pipe()  # its end would end the replica
        self._process = context.Process(target=_be_replica, args=(spec, theirs, str(self._log)), daemon=True)
        self._theirs: Connection = theirs
        headers = {"Authorization": f"Bearer {token}"}
        transport = httpx.HTTPTransport(uds=socket)
        self._client = httpx.Client(transport=transport, base_url="http://replica", headers=headers, timeout=_ASK_S)
        self.details: dict[str, Any] = {}

    def __enter__(self) -> MeasuredReplica:
        self._process.start()
        self._theirs.close()
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
            if not self._process.is_alive():
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
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            try:
                return int(psutil.Process(self._process.pid).memory_info().rss)
            except psutil.Error:
                return None

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._alive.close()
        self._process.terminate()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._folder.cleanup()


def _be_replica(spec: dict[str, Any], alive: Connection, log: str) -> None:
    """What a fork does."""
    import msgspec

    from jupyter_llmcloud.inference.replica import Replica, ReplicaSpec

    with open_log(Path(log)) as fd:
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    status = asyncio.run(Replica(ReplicaSpec.parse(msgspec.json.encode(spec))).run(alive.fileno()))
    os._exit(status)  # an engine that is stuck in a step must not keep the process alive
