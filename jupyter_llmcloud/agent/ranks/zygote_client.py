"""The agent's side of the zygote: ask for a fork, hear of exits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import WorldError


class ZygoteClient:
    """Starts the zygote process, forks from it, starts another when it has died.

    Args:
        log: file for what the zygote itself prints.
        on_exit: called with (id, status) when a forked process has ended.
    """

    def __init__(self, log: Path, on_exit: Callable[[str, int], None]) -> None:
        self.log = log
        self.on_exit = on_exit
        self.process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._forks: dict[str, asyncio.Future[int]] = {}
        self._alive: dict[str, int] = {}  # pids

    def warm(self) -> asyncio.Future[None]:
        """Start importing, if that has not begun; the future is done when forks are instant."""
        if self._ready is None:
            self._start()
        assert self._ready is not None
        return self._ready

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        env = {
            **os.environ,
            **single,
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyter_llmcloud.training.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # what is killed with the agent's group cannot clean up behind the agent
            )
        theirs.close()
        self._sock = ours
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        loop.add_reader(ours.fileno(), self._readable)

    async def fork(self, name: str, request: dict[str, Any], fds: list[int]) -> int:
        """Fork a process that begins with `request` and these file descriptors; returns its pid."""
        await asyncio.shield(self.warm())
        assert self._sock is not None
        forked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forks[name] = forked
        socket.send_fds(self._sock, [json.dumps({"id": name, **request}).encode()], fds)
        return await forked

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        answer = json.loads(data)
        if "ready" in answer:
            assert self._ready is not None
            self._ready.set_result(None)
        elif "forked" in answer:
            self._alive[answer["forked"]] = answer["pid"]
            self._forks.pop(answer["forked"]).set_result(answer["pid"])
        else:
            self._alive.pop(answer["exited"], None)
            self.on_exit(answer["exited"], answer["status"])

    def _lost(self) -> None:
        assert self._sock is not None and self._ready is not None and self.process is not None
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()
        status = self.process.wait()
        tail = self.log.read_text(errors="replace")[-2000:].strip()
        error = WorldError(f"the process that forks ranks ended with status {status}. Its last words:\n{tail}")
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._forks.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: who still waits for it is told, nobody else is warned
        self._forks.clear()
        self._ready = None
        alive, self._alive = self._alive, {}
        for name, pid in alive.items():  # its children end with it, and nobody else is told of that
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what they had started
            self.on_exit(name, -signal.SIGKILL)

    def close(self) -> None:
        """End the zygote and with it whatever was forked from it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
