"""The process that makes models smaller: started for one request, followed, and ended with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from jupyter_llmcloud.errors import InternalError, LLMCloudError, UsageError
from jupyter_llmcloud.protocol.compression import Event, Failed, Request, WorkProgress
from jupyter_llmcloud.system.spawn import log_tail, spawn

MODULE = "jupyter_llmcloud.compression"
_END_S = 15.0  # it removes what it has begun


class CompressionProcess:
    """Works on one request within the block; afterwards it is gone, whatever happened."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._folder = tempfile.TemporaryDirectory(prefix="llmcloud-compress-")
        self._process: subprocess.Popen[bytes] | None = None
        self._read = -1

    def __enter__(self) -> CompressionProcess:
        self._read, write = os.pipe()
        try:
            log = Path(self._folder.name) / "log"
            command = [sys.executable, "-m", MODULE, str(write)]
            self._process = spawn(command, log, takes_input=True, env=dict(os.environ), pass_fds=(write,))
        finally:
            os.close(write)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._request) + b"\n")
        self._process.stdin.flush()  # it stays open: its end would end the process
        return self

    def events(self, progress: Callable[[str], None]) -> Iterator[Event]:
        """What it tells, but for how far it is. Raises the error that it met."""
        with os.fdopen(self._read, "rb", closefd=True) as lines:
            self._read = -1
            for line in lines:
                event: Event = msgspec.json.decode(line, type=Event)
                if isinstance(event, WorkProgress):
                    progress(event.text)
                elif isinstance(event, Failed):
                    raise _error(event)
                else:
                    yield event
        assert self._process is not None
        if status := self._process.wait(_END_S):
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


@contextmanager
def kept_texts(texts: Sequence[str] | None) -> Iterator[str]:
    """A file with texts within the block, for a process; "" when there are none."""
    if texts is None:
        yield ""
        return
    handle, path = tempfile.mkstemp(prefix="llmcloud-texts-", suffix=".json")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(list(texts), file)
        yield path
    finally:
        Path(path).unlink(missing_ok=True)


def texts_of_file(path: Path) -> list[str]:
    """Texts in a file: of JSON lines the field `text` of each, else its whole content. Raises UsageError."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        return [content]
    try:
        return [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: each line must be a JSON object with a field text.") from None
