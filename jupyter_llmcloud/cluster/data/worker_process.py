"""A process beside a Dask worker that carries partitions out: it can be ended at any time, and takes its memory along.

The worker itself only waits: its event loop stays free, code of the user that crashes takes no worker with it, and a
partition is not bound to the one thread that our workers have.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
from typing import Any

import cloudpickle

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.rpc import restored_body

_LENGTH = struct.Struct(">Q")
_idle: dict[str, list[PartitionProcess]] = {}  # by preparation
_living: dict[str, set[PartitionProcess]] = {}
_ended: set[str] = set()
_lock = threading.Lock()
IDLE_S = 60.0
IDLE_STATUS = 75  # a process that had nothing to do for so long has ended
_NICE = 5  # ranks that train beside it come first


def write_message(file: Any, content: bytes) -> None:
    """Send bytes behind their length."""
    file.write(_LENGTH.pack(len(content)))
    file.write(content)
    file.flush()


def read_message(file: Any) -> bytes:
    """Take such bytes. Raises EOFError at the end."""
    (size,) = _LENGTH.unpack(_read_exactly(file, _LENGTH.size))
    return _read_exactly(file, size)


def _read_exactly(file: Any, size: int) -> bytes:
    parts = []
    while size:
        if not (part := file.read(size)):
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class PartitionProcess:
    """One such process, which has the recipe of one preparation."""

    def __init__(self, recipe: bytes) -> None:
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_llmcloud.cluster.data", str(write)],
            stdin=subprocess.PIPE,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        self._replies = os.fdopen(read, "rb")
        try:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)
        except OSError:
            pass
        self._send(recipe)

    def _send(self, request: bytes) -> Any:
        try:
            write_message(self._process.stdin, request)
            is_done, result = pickle.loads(read_message(self._replies))
        except (EOFError, BrokenPipeError) as error:
            raise ProcessEnded(self._process.wait()) from error
        if not is_done:
            raise restored_body(result, "a partition failed.")
        return result

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of PartitionWork there. Raises what it raises, and ProcessEnded."""
        return self._send(cloudpickle.dumps((method, arguments)))

    def end(self) -> None:
        """At once."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass
        self._replies.close()


class ProcessEnded(UsageError):
    """The process has ended while it worked, with this status."""

    def __init__(self, status: int) -> None:
        self.status = status
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        super().__init__(
            f"the process that prepared a partition {how}: a step or the tokenizer has crashed it, or the memory of "
            "its host was used up (a smaller partition_size, or fewer processes, need less)."
        )


def carry_out(preparation: str, recipe: bytes, method: str, arguments: tuple[Any, ...]) -> Any:
    """Run a method of PartitionWork in a process of this preparation: one that is idle, else a new one."""
    while True:
        process, is_new = _take(preparation, recipe)
        try:
            result = process.call(method, *arguments)
        except ProcessEnded as error:
            _forget(preparation, process)
            if error.status == IDLE_STATUS and not is_new:
                continue  # it ended just as it was asked
            raise
        except BaseException:
            _forget(preparation, process)
            raise
        with _lock:
            if process in _living.get(preparation, ()):
                _idle.setdefault(preparation, []).append(process)
        return result


def _take(preparation: str, recipe: bytes) -> tuple[PartitionProcess, bool]:
    with _lock:
        if preparation in _ended:
            raise UsageError("the preparation was stopped.")
        if waiting := _idle.get(preparation):
            return waiting.pop(), False
    process = PartitionProcess(recipe)
    with _lock:
        is_late = preparation in _ended
        if not is_late:
            _living.setdefault(preparation, set()).add(process)
    if is_late:
        process.end()
        raise UsageError("the preparation was stopped.")
    return process, True


def _forget(preparation: str, process: PartitionProcess) -> None:
    with _lock:
        _living.get(preparation, set()).discard(process)
    process.end()


def end_processes(preparation: str) -> None:
    """End all processes of a preparation, also those at work."""
    with _lock:
        _ended.add(preparation)
        _idle.pop(preparation, None)
        processes = _living.pop(preparation, set())
    for process in processes:
        process.end()
