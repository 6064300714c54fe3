"""What leaves a rank while its main thread works: text, displays and metrics, in order, a few times a second."""

from __future__ import annotations

import io
import math
import socket
import threading
import time
from typing import Any

from jupyter_llmcloud.core.messages import Measured, Message, Printed, encode

BATCH_S = 0.03  # a reader's eye does not see less
MAX_PENDING = 64 << 10  # characters; more is sent at once, so that printing is held back by a slow reader


class Outlet:
    """The only writer of the rank's socket. Records are batched; `flush` sends what is pending."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.RLock()
        self._logs: list[dict[str, Any]] = []
        self._metrics: list[dict[str, Any]] = []
        self._size = 0
        self._wake = threading.Event()
        threading.Thread(target=self._pump, name="llmcloud-outlet", daemon=True).start()

    def send(self, message: Message) -> None:
        """Flush, then send a message, so that it comes after everything printed before."""
        with self._lock:
            self.flush()
            self._sock.sendall(encode(message))

    def text(self, kind: str, text: str) -> None:
        """Text written to stdout or stderr."""
        with self._lock:
            last = self._logs[-1] if self._logs else None
            if last is not None and last["kind"] == kind:
                last["parts"].append(text)
            else:
                self._logs.append({"kind": kind, "t": time.time(), "parts": [text]})
            self._size += len(text)
            if self._size > MAX_PENDING:
                self.flush()
        self._wake.set()

    def record(self, record: dict[str, Any]) -> None:
        """A display, a result or an error."""
        with self._lock:
            self._logs.append({"t": time.time(), **record})
        self._wake.set()

    def measure(self, record: dict[str, Any]) -> None:
        """A metric or progress record; costs an append."""
        record["t"] = time.time()
        self._metrics.append(record)
        self._wake.set()

    def flush(self) -> None:
        """Send what is pending."""
        with self._lock:
            logs, self._logs, self._size = self._logs, [], 0
            metrics, self._metrics = self._metrics, []
            for record in logs:
                if "parts" in record:
                    record["text"] = "".join(record.pop("parts"))
            if logs:
                self._sock.sendall(encode(Printed(records=logs)))
            if metrics:
                self._sock.sendall(encode(Measured(records=metrics)))

    def _pump(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(BATCH_S)
            self._wake.clear()
            try:
                self.flush()
            except OSError:
                return  # the agent has gone; the control thread ends this process


class StreamToOutlet(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of a rank."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, outlet: Outlet, kind: str, fd: int) -> None:
        self._outlet = outlet
        self._kind = kind
        self._fd = fd

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            self._outlet.text(self._kind, text)
        return len(text)

    def flush(self) -> None:
        pass  # the outlet sends within BATCH_S; a flush per line would cost a wake-up per line

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    @property
    def name(self) -> str:
        return f"<{self._kind}>"


def number(value: Any) -> float | None:
    """A metric's value as a float; None when it is not one number. Tensors and arrays of one element count."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    item = getattr(value, "item", None)
    if item is None or isinstance(value, str):
        return None
    try:
        return float(item())
    except (TypeError, ValueError, RuntimeError):
        return None


def json_safe(value: float) -> float | str:
    """JSON has no NaN or infinity: they travel as text."""
    return value if math.isfinite(value) else str(value)
