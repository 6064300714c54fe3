"""The agent's side of the zygote: ask for a fork, hear of exits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jupyter_llmcloud.agent.ranks.forked_process import ForkedProcess
from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.protocol.connection import NEXT_AGENT
from jupyter_llmcloud.protocol.frames import Message, decode, encode
from jupyter_llmcloud.protocol.rank_messages import (
    Forked,
    ForkEnded,
    ForkProgram,
    ForkRank,
    ForkStore,
    ZygoteReady,
)
from jupyter_llmcloud.protocol.rpc import Calls, Reply
from jupyter_llmcloud.system.spawn import log_tail, spawn

_PEER = "the process that forks ranks"
SOCKET = "next.sock"


class InheritedProcess:
    """The zygote of an agent that was killed, which is no child of this process. As subprocess.Popen.

    Raises OSError when it has gone.
    """

    def __init__(self, control: socket.socket) -> None:
        peer = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid: int = struct.unpack("3i", peer)[0]
        self._pidfd = os.pidfd_open(self.pid)
        self._end = select.poll()  # an agent has more descriptors than `select` has numbers
        self._end.register(self._pidfd, select.POLLIN)

    def poll(self) -> int | None:
        """None while it lives; how it has ended nobody is told."""
        return 0 if self._end.poll(0) else None

    def wait(self) -> int:
        """Return when it has ended."""
        self._end.poll()
        return 0

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _inherited(path: Path) -> tuple[socket.socket, InheritedProcess] | None:
    """The zygote that waits at this socket for an agent, if there is one."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        control.connect(str(path))
        return control, InheritedProcess(control)
    except OSError:
        control.close()
        return None


class ZygoteClient:
    """Starts the zygote process, forks from it, starts another when it has died.

    Args:
        log: file for what the zygote itself prints; beside it is the socket at which one waits for the next agent.
        on_exit: called with (id, status) when a forked rank or store has ended.
        stays_s: for how long it waits for the agent that takes this one's place, should this one be killed.
    """

    def __init__(self, log: Path, on_exit: Callable[[str, int], None], stays_s: float = 0.0) -> None:
        self.log = log
        self.on_exit = on_exit
        self.process: subprocess.Popen[bytes] | InheritedProcess | None = None
        self._stays_s = stays_s
        self._sock: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._calls = Calls(_PEER)
        self._alive: dict[str, int] = {}  # pids
        self._programs: dict[str, asyncio.Future[int]] = {}  # their statuses, once they have ended

    def warm(self) -> asyncio.Future[None]:
        """Start importing, if that has not begun; the future is done when forks are instant."""
        if self._ready is None:
            self._start()
        assert self._ready is not None
        return self._ready

    @property
    def is_warm(self) -> bool:
        """Whether nothing is being imported now: forks are instant, unless it has died and starts with the next one."""
        return self._ready is None or self._ready.done()

    @property
    def is_inherited(self) -> bool:
        """Whether it was that of an agent that was killed: what that one had started has ended."""
        return isinstance(self.process, InheritedProcess) and self._ready is not None and self._ready.done()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        found = _inherited(self.log.with_name(SOCKET)) if self._stays_s else None
        self._sock, self.process = found or self._spawned()
        self._sock.setblocking(False)
        loop.add_reader(self._sock.fileno(), self._readable)

    def _spawned(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        env = {
            **os.environ,
            **single,
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        if self._stays_s:
            env[NEXT_AGENT] = f"{self._stays_s:g}:{self.log.with_name(SOCKET)}"
        command = [sys.executable, "-m", "jupyter_llmcloud.training.zygote", str(theirs.fileno())]
        # Detached: what is killed with the agent's group cannot clean up behind the agent.
        process = spawn(command, self.log, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        return ours, process

    async def start(self, request: ForkProgram, fds: list[int]) -> ForkedProcess:
        """Fork a program with these standard input, output and error; it ends with the zygote."""
        ended = self._programs[request.name] = asyncio.get_running_loop().create_future()
        try:
            return ForkedProcess(await self.fork(request, fds), ended)
        except BaseException:
            self._programs.pop(request.name, None)
            raise

    async def fork(self, request: ForkRank | ForkStore | ForkProgram, fds: list[int]) -> int:
        """Fork a process that begins with `request` and these file descriptors; returns its pid."""
        await asyncio.shield(self.warm())
        sock = self._sock
        assert sock is not None
        return (await self._calls.ask(request, lambda message: self._send(sock, message, fds))).pid

    @staticmethod
    def _send(sock: socket.socket, message: Message, fds: list[int]) -> None:
        socket.send_fds(sock, [encode(message)], fds)

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
        match decode(data):
            case ZygoteReady():
                assert self._ready is not None
                self._ready.set_result(None)
            case ForkEnded(name=name, status=status):
                self._alive.pop(name, None)
                self._ended(name, status)
            case Reply() as reply:
                if isinstance(reply, Forked):
                    self._alive[reply.name] = reply.pid
                self._calls.take(reply)

    def _ended(self, name: str, status: int) -> None:
        if (program := self._programs.pop(name, None)) is None:
            self.on_exit(name, status)
        elif not program.done():
            program.set_result(status)

    def _lost(self) -> None:
        assert self._sock is not None and self._ready is not None and self.process is not None
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()
        status = self.process.wait()
        is_inherited = isinstance(self.process, InheritedProcess)
        if is_inherited and not self._ready.done():  # it had just ceased to wait
            self._sock, self.process = self._spawned()
            self._sock.setblocking(False)
            asyncio.get_running_loop().add_reader(self._sock.fileno(), self._readable)
            return
        tail = log_tail(self.log)
        how = "" if is_inherited else f" with status {status}"
        error = WorldError(f"the process that forks ranks ended{how}. Its last words:\n{tail}")
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # seen: who still waits for it is told, nobody else is warned
        self._calls.fail(error)
        self._calls, self._ready = Calls(_PEER), None
        alive, self._alive = self._alive, {}
        for name, pid in alive.items():  # its children end with it, and nobody else is told of that
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what they had started
            self._ended(name, -signal.SIGKILL)

    def close(self) -> None:
        """End the zygote and with it whatever was forked from it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._stays_s:
            self.log.with_name(SOCKET).unlink(missing_ok=True)
