"""A rank that this agent hosts: its process, its socket, its two pipes."""

from __future__ import annotations

import asyncio
import codecs
import os
import select
import shutil
import signal
import socket
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from jupyter_llmcloud.agent.ranks import process_info
from jupyter_llmcloud.agent.ranks.process_info import MemoryEvidence, StackDump
from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.core.run.stacks import is_crash, shortened_crash
from jupyter_llmcloud.errors import ProtocolError
from jupyter_llmcloud.protocol.frames import Decoder, Message, encode
from jupyter_llmcloud.protocol.rank_messages import (
    CellEnded,
    Exit,
    ForkRank,
    Heartbeat,
    LogRecords,
    MetricRecords,
    RankProbed,
)
from jupyter_llmcloud.system.shared_ring import RingReader, create_ring

MAX_READ = 1 << 16  # bytes: for a larger buffer the allocator would ask the system for pages, each time
DUMP_S = 0.3  # a signal's handler has run by then
CRASH_S = 0.3  # the stacks of a process that crashes are printed by then


class RankLink(Protocol):
    """How a world reaches one of its ranks, wherever it is."""

    rank: int

    def send(self, message: Message) -> None:
        """Tell the rank something."""

    def kill(self) -> None:
        """End its process now."""

    def look(self, dump: bool = False) -> None:
        """Look at its process from outside; a RankProbed of it follows, with its stacks if `dump`."""

    def drain(self) -> None:
        """Deliver what it has written to its file descriptors so far."""

    def describe(self) -> dict[str, Any]:
        """pid and host."""


class LocalRank:
    """Forked from this agent's zygote. Messages of the rank go to `on_message`."""

    def __init__(self, rank: int, name: str, on_message: Callable[[int, Message], None]) -> None:
        self.rank = rank
        self.name = name
        self.pid = 0
        self.alive = False
        self._on_message = on_message
        self._decoder = Decoder(f"rank {rank}")
        self._sock: socket.socket | None = None
        self._pipes = _OutputPipes(lambda record: self._on_message(self.rank, LogRecords(records=[record])))
        self._outgoing = bytearray()
        self._ring: RingReader | None = None
        self._memory: MemoryEvidence | None = None
        self._sockets = ""

    async def start(self, zygote: ZygoteClient, request: ForkRank) -> None:
        """Fork it."""
        self._sockets = request.sockets
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ring = create_ring()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            self.pid = await zygote.fork(request, [theirs.fileno(), out_write, err_write, ring])
        finally:
            self._ring = RingReader(ring)
            os.close(ring)
            theirs.close()
            os.close(out_write)
            os.close(err_write)
        self.alive = True
        self._memory = MemoryEvidence(self.pid)
        ours.setblocking(False)
        self._sock = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable)
        self._pipes.open({out_read: "stdout", err_read: "stderr"})

    # --- to the rank ---

    def send(self, message: Message) -> None:
        """Queue a message to the rank; one that has gone gets none."""
        if self._sock is None:
            return
        waiting = bool(self._outgoing)
        self._outgoing += encode(message)
        if not waiting and not self._write():
            asyncio.get_running_loop().add_writer(self._sock.fileno(), self._writable)

    def _write(self) -> bool:
        """Hand over what is to be sent; whether that was all."""
        assert self._sock is not None
        try:
            while self._outgoing:
                del self._outgoing[: self._sock.send(self._outgoing)]
        except BlockingIOError:
            return False
        except OSError:
            self._outgoing.clear()
        return True

    def _writable(self) -> None:
        if self._sock is not None and self._write():
            asyncio.get_running_loop().remove_writer(self._sock.fileno())

    def kill(self) -> None:
        """SIGKILL the rank and what it has started: it leads a session of its own."""
        if self.alive:
            for send_signal in (os.killpg, os.kill):
                try:
                    send_signal(self.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue

    def leave(self) -> None:
        """Ask it to end."""
        self.send(Exit())

    def look(self, dump: bool = False) -> None:
        """Have the process looked at: its state and processor time, or with `dump` the stacks of its threads."""
        if not dump:
            state, cpu_s = process_info.state(self.pid)
            self._on_message(self.rank, RankProbed(state=state, cpu_s=cpu_s))
            return
        asking = StackDump(self.pid)
        asyncio.get_running_loop().call_later(DUMP_S, self._tell_dump, asking)

    def _tell_dump(self, asking: StackDump) -> None:
        state, cpu_s = process_info.state(self.pid)
        busy = cpu_s - asking.cpu_s > DUMP_S / 4
        looked = RankProbed(state=state, cpu_s=cpu_s, busy=busy, dump=asking.read(), dumped=True)
        self._on_message(self.rank, looked)

    def evidence(self, status: int) -> str:
        """What speaks for a lack of memory as the cause of its end."""
        return self._memory.of_death(status) if self._memory is not None else ""

    def describe(self) -> dict[str, Any]:
        """Its pid and host."""
        return {"pid": self.pid, "host": socket.gethostname()}

    # --- from the rank ---

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(MAX_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            return
        try:
            messages = self._decoder.feed(data)
        except ProtocolError as error:  # something in that process has written to a descriptor that is not its own
            self._on_message(
                self.rank, LogRecords(records=[{"kind": "stderr", "text": f"this rank is ended: {error}\n"}])
            )
            self.kill()
            return
        for message in messages:
            if isinstance(message, MetricRecords | CellEnded):
                self._read_metrics()
                self.drain()
            if isinstance(message, Heartbeat) and self._memory is not None:
                self._memory.rss = message.rss
            if not isinstance(message, MetricRecords):
                self._on_message(self.rank, message)

    def _read_metrics(self) -> None:
        if self._ring is not None and (records := [_metric_record(data) for data in self._ring.read()]):
            self._on_message(self.rank, MetricRecords(records=records))

    def drain(self) -> None:
        """Read what its pipes still hold."""
        self._pipes.drain()

    def closed(self) -> None:
        """The process has gone: deliver its last words, then let go of its descriptors and its sockets."""
        self.alive = False
        shutil.rmtree(self._sockets, ignore_errors=True)
        if self._sock is not None:
            self._readable()
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock.fileno())
            loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None
        self._read_metrics()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._pipes.close()


class _OutputPipes:
    """What a rank writes to its file descriptors, by the loop's reader or when it is asked for; records go to `say`."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self._say = say
        self._kinds: dict[int, str] = {}
        self._written = select.poll()  # which of them hold something
        self._letters: dict[int, codecs.IncrementalDecoder] = {}  # one may come in two pieces
        self._crashes: dict[int, str] = {}  # what is printed of a crash, until it has been printed

    def open(self, kinds: dict[int, str]) -> None:
        """Read from these descriptors from now on."""
        self._kinds = kinds
        self._letters = {fd: codecs.getincrementaldecoder("utf-8")("replace") for fd in kinds}
        for fd in kinds:
            os.set_blocking(fd, False)
            asyncio.get_running_loop().add_reader(fd, self._readable, fd)
            self._written.register(fd, select.POLLIN)

    def _readable(self, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 18)
        except BlockingIOError:
            return
        if data:
            if text := self._letters[fd].decode(data):
                self._hear(fd, text)
        else:
            self._tell_crash(fd)
            self._close_one(fd)
            del self._kinds[fd]

    def _hear(self, fd: int, text: str) -> None:
        if fd in self._crashes:
            self._crashes[fd] += text
        elif is_crash(text):
            self._crashes[fd] = text
            asyncio.get_running_loop().call_later(CRASH_S, self._tell_crash, fd)
        else:
            self._say({"kind": self._kinds[fd], "text": text})

    def _tell_crash(self, fd: int) -> None:
        if text := self._crashes.pop(fd, ""):
            self._say({"kind": self._kinds[fd], "text": shortened_crash(text)})

    def drain(self) -> None:
        """Deliver what was written so far."""
        for fd, _ in self._written.poll(0):
            self._readable(fd)

    def close(self) -> None:
        """Deliver the last words, then let go of the descriptors."""
        self.drain()
        for fd in self._kinds:
            self._tell_crash(fd)
            self._close_one(fd)
        self._kinds = {}

    def _close_one(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        self._written.unregister(fd)
        os.close(fd)


def _metric_record(data: bytes) -> dict[str, Any]:
    """What a rank wrote to its ring, as a journal has it."""
    kind, now, first, second, third = msgspec.msgpack.decode(data)
    if kind == "progress":
        return {"t": now, "progress": [first, second], "desc": third}
    at = {} if third is None else {"at": third}
    return {"t": now, "step": first, "values": second, **at}
