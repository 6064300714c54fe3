"""What leaves a rank while its main thread works: text, displays and metrics, in order, a few times a second."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from jupyter_llmcloud.protocol.frames import Message, encode
from jupyter_llmcloud.protocol.rank_messages import LogRecords, MetricRecords
from jupyter_llmcloud.system.shared_ring import RingWriter

BATCH_S = 0.03  # a reader's eye does not see less
MAX_PENDING = 64 << 10  # characters; more is sent at once, so that printing is held back by a slow reader
MAX_WAITING = 4 << 10  # characters that may wait for the end of their line
MAX_BETWEEN = 32 << 10  # characters that threads write between two cells; of more the newest are kept
MAX_RECORD = 8 << 20  # characters of a display; a cell shows half as much
_MAX_INT, _MIN_INT = (1 << 64) - 1, -(1 << 63)  # that a message carries
_ENCODE = msgspec.msgpack.Encoder().encode
_EXACT = 1 << 53  # up to here a float is the whole number that it was


class OutputSender:
    """The only writer of the rank's socket and of its ring of metrics.

    Text and displays are batched; `flush` sends what is pending. Metrics are in shared memory at once, so that a rank
    that is killed has lost none; an empty message tells the agent to look. A cell's main thread never
    writes to the socket itself: an interrupt would leave half a frame behind.
    """

    def __init__(self, sock: socket.socket, ring: RingWriter) -> None:
        self.muted = False  # while a restarted cell is led back to its resume point: all this was said before
        self.forked = False  # in a child of the rank, which has neither the threads nor the right to the socket
        self._sock = sock
        self._ring = ring
        self._lock = threading.RLock()
        self._sent = threading.Condition(self._lock)
        self._logs: list[dict[str, Any]] = []
        self._between: OutputBetween | None = None
        self._has_metrics = False
        self._size = 0
        self._wake = threading.Event()
        self._full = threading.Event()
        os.register_at_fork(after_in_child=self._note_fork)
        threading.Thread(target=self._pump, name="llmcloud-sender", daemon=True).start()

    def _note_fork(self) -> None:
        self.forked = True

    def send(self, message: Message) -> None:
        """Flush, then send a message, so that it comes after everything printed before."""
        with self._lock:
            self.flush()
            self._sock.sendall(encode(message))

    def text(self, kind: str, text: str) -> None:
        """Text written to stdout or stderr; what is long leaves in pieces, which every reader can take at once."""
        if self.muted or self._keeps_for_later(kind, text):
            return
        for start in range(0, len(text), MAX_PENDING):
            self._add(kind, text[start : start + MAX_PENDING])

    def end_cell(self) -> None:
        """What threads of the cell write from now on is that of the next one: no run is there to be shown it."""
        self._between = OutputBetween()

    def begin_cell(self) -> None:
        """A run is there again."""
        with self._lock:
            between, self._between = self._between, None
            for kind, text in between.taken() if between is not None else ():
                self.text(kind, text)

    def _keeps_for_later(self, kind: str, text: str) -> bool:
        """Of threads that a cell has left running alone: what is done for the world between two cells is no output."""
        if self._between is None or threading.current_thread() is threading.main_thread():
            return False
        with self._lock:
            if self._between is None:
                return False
            self._between.add(kind, text)
            return True

    def _add(self, kind: str, text: str) -> None:
        with self._lock:
            last = self._logs[-1] if self._logs else None
            if last is not None and last["kind"] == kind and "parts" in last:
                last["parts"].append(text)
            else:
                self._logs.append({"kind": kind, "t": time.time(), "parts": [text]})
            self._hold_back(len(text))

    def _hold_back(self, size: int) -> None:
        self._size += size
        self._wake.set()
        if self._size > MAX_PENDING:
            self._full.set()
            self._sent.wait_for(lambda: self._size <= MAX_PENDING)

    def record(self, record: dict[str, Any]) -> None:
        """A display, a result or an error."""
        if self.forked or self.muted:
            return
        # Here, where an error is the cell's: one of the thread that sends would cost the rank.
        record = _as_json(record)
        size = sum(len(str(value)) for value in (record.get("data") or {}).values())
        if size > MAX_RECORD:
            kinds = ", ".join(record["data"])
            text = f"A {record['kind']} of {size / 1e6:.0f} MB ({kinds}) is too large to be shown: write it to a file."
            record, size = {"kind": "stderr", "text": f"{text}\n"}, len(text)
        with self._lock:
            self._logs.append({"t": time.time(), **record})
            self._hold_back(size)

    def warning(self, kind: str, text: str) -> None:
        """Text that says the same on every rank: shown once."""
        self.record({"kind": kind, "text": text, "warning": True})

    def measure(self, kind: str, first: Any, second: Any, third: Any = None) -> None:
        """A record of kind "values" (step, {name: float}, optimizer steps) or "progress" (done, total, desc)."""
        if self.forked or self.muted:
            return
        self._ring.write(_ENCODE((kind, time.time(), first, second, third)))
        if not self._has_metrics:
            self._has_metrics = True
            self._wake.set()

    def flush(self, *, may_wait: bool = False) -> None:
        """Send what is pending; with `may_wait` a line that has no end yet once waits for the next time.

        `print` writes a line and its end one after the other. What a subprocess says meanwhile comes by another way and
        would stand between them.
        """
        with self._lock:
            is_open = may_wait and 0 < self._size <= MAX_WAITING and _has_open_line(self._logs[-1])
            waits = [{**self._logs.pop(), "waited": True}] if is_open else []
            logs, self._logs = self._logs, waits
            self._size = sum(len(part) for record in waits for part in record["parts"])
            if waits:
                self._wake.set()
            has_metrics, self._has_metrics = self._has_metrics, False
            for record in logs:
                if "parts" in record:
                    record.pop("waited", None)
                    record["text"] = "".join(record.pop("parts"))
            if logs:
                self._sock.sendall(encode(LogRecords(records=logs)))
            if has_metrics:
                self._sock.sendall(encode(MetricRecords(records=[])))
            self._sent.notify_all()

    def _pump(self) -> None:
        while True:
            self._wake.wait()
            self._full.wait(BATCH_S)
            self._full.clear()
            self._wake.clear()
            try:
                self.flush(may_wait=True)
            except OSError:
                return  # the agent has gone; the control thread ends this process


def _as_json(value: Any) -> Any:
    """The value as messages carry it, as JSON has it. Raises TypeError for what it has no form for."""
    try:
        return msgspec.to_builtins(value, str_keys=True, enc_hook=_plain)
    except TypeError:  # also of the keys None, True and False, which JSON has as texts
        return json.loads(json.dumps(value, default=lambda other: msgspec.to_builtins(other, enc_hook=_plain)))


class OutputBetween:
    """What threads write while no cell is executed: the newest of it."""

    def __init__(self) -> None:
        self._texts: deque[tuple[str, str]] = deque()
        self._size = 0
        self._is_whole = True

    def add(self, kind: str, text: str) -> None:
        """Of a stream."""
        self._texts.append((kind, text))
        self._size += len(text)
        while (excess := self._size - MAX_BETWEEN) > 0:
            first, oldest = self._texts.popleft()
            if len(oldest) > excess:
                self._texts.appendleft((first, oldest[excess:]))
            self._size -= min(excess, len(oldest))
            self._is_whole = False

    def taken(self) -> list[tuple[str, str]]:
        """All of it, by stream, in its order; says where some is missing."""
        missing = [] if self._is_whole else [("stderr", "… what threads had written before is left out.\n")]
        return [*missing, *self._texts]


def _plain(value: Any) -> Any:
    """What a kernel's messages make of a value that JSON does not know. Raises TypeError as they do."""
    if isinstance(value, str):  # of a class of its own, such as a text that a template has made
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"a display holds a {type(value).__name__} object, which is no JSON: give it as text or numbers.")


def _has_open_line(record: dict[str, Any]) -> bool:
    """Whether it is text whose last line has no end, and that has not waited for it."""
    return "parts" in record and "waited" not in record and not record["parts"][-1].endswith("\n")


class RankByteStream(io.RawIOBase):
    """`sys.stdout.buffer` of a rank."""

    def __init__(self, text: RankStream) -> None:
        self._text = text

    def write(self, data: Any) -> int:
        taken = bytes(data)
        self._text.write(taken.decode(self._text.encoding, "replace"))
        return len(taken)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._text.fileno()


class RankStream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of a rank."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, sender: OutputSender, kind: str, fd: int) -> None:
        self._sender = sender
        self.kind = kind
        self._fd = fd

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._sender.forked:
            os.write(self._fd, text.encode("utf-8", "replace"))
        elif text:
            self._sender.text(self.kind, text)
        return len(text)

    @property
    def buffer(self) -> RankByteStream:
        """For what is written as bytes."""
        return RankByteStream(self)

    def reconfigure(self, **_: Any) -> None:
        """What a script asks of its terminal makes no difference here."""

    def flush(self) -> None:
        pass  # the sender sends within BATCH_S; a flush per line would cost a wake-up per line

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    @property
    def name(self) -> str:
        return f"<{self.kind}>"


def number(value: Any) -> float | None:
    """A metric's value as a float; None when it is not one number. Tensors and arrays of one element count."""
    try:
        if isinstance(value, (bool, int, float)):
            return float(value)
        item = getattr(value, "item", None)
        return None if item is None or isinstance(value, str) else float(item())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def place(value: Any) -> Any:
    """A step, or how far a bar is, as a message carries it; loops over arrays count in numbers of NumPy or torch."""
    if value is None or type(value) in (float, str) or (type(value) is int and _MIN_INT <= value <= _MAX_INT):
        return value
    found = number(value)
    return int(found) if found is not None and found.is_integer() and abs(found) <= _EXACT else found
