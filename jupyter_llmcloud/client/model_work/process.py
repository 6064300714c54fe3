"""A process that works on a model: started for one request, followed, and ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from jupyter_llmcloud.errors import InternalError, LLMCloudError
from jupyter_llmcloud.protocol import compression, explanation
from jupyter_llmcloud.protocol.model_work import Failed, WorkProgress
from jupyter_llmcloud.system.spawn import log_tail, spawn

_END_S = 15.0  # it removes what it has begun


class ModelProcess:
    """Works on one request within the block; afterwards it is gone, whatever happened.

    Args:
        request: of `protocol.compression` or `protocol.explanation`.
        module: the package that is started, by its name.
        events: the type of what it tells.
    """

    def __init__(self, request: Any, module: str, events: Any) -> None:
        self._request = request
        self._module = module
        self._events = events
        self._folder = tempfile.TemporaryDirectory(prefix="llmcloud-model-")
        self._process: subprocess.Popen[bytes] | None = None
        self._read = -1

    def __enter__(self) -> Self:
        self._read, write = os.pipe()
        try:
            log = Path(self._folder.name) / "log"
            command = [sys.executable, "-m", self._module, str(write)]
            self._process = spawn(command, log, takes_input=True, env=dict(os.environ), pass_fds=(write,))
        finally:
            os.close(write)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._request) + b"\n")
        self._process.stdin.flush()  # it stays open: its end would end the process
        return self

    def events(self, progress: Callable[[str], None]) -> Iterator[Any]:
        """What it tells, but for how far it is. Raises the error that it met."""
        with os.fdopen(self._read, "rb", closefd=True) as lines:
            self._read = -1
            for line in lines:
                event = msgspec.json.decode(line, type=self._events)
                if isinstance(event, WorkProgress):
                    progress(event.text)
                elif isinstance(event, Failed):
                    raise _error(event)
                else:
                    yield event
        assert self._process is not None
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # all is told: what libraries do in their end on a busy machine is waited for
            return  # no longer
        if status:
            tail = log_tail(Path(self._folder.name) / "log")
            raise InternalError(f"the process that works on the model ended with status {status}. {tail}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._read >= 0:
            os.close(self._read)
        if self._process is not None:
            _end(self._process)
        self._folder.cleanup()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _error(failed: Failed) -> LLMCloudError:
    kind = LLMCloudError.by_code.get(failed.kind, InternalError)
    return kind.restored(failed.text, {})


class CompressionProcess(ModelProcess):
    """Makes, measures or exports models."""

    def __init__(self, request: compression.Request) -> None:
        super().__init__(request, "jupyter_llmcloud.compression", compression.Event)


class ExplanationProcess(ModelProcess):
    """Explains what a model answers, or tries it with inputs that are changed."""

    def __init__(self, request: explanation.Request) -> None:
        super().__init__(request, "jupyter_llmcloud.explanation", explanation.Event)
