"""Chat templates, rendered by processes that are ended when they take too long."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jupyter_llmcloud.inference.openai.chat.template_process import CPU_S, read_message, write_message

RENDER_S = 8.0  # on the clock; the budget of processor time ends a template sooner, unless the machine is busy
START_S = 60.0
MAX_PROCESSES = 4
MORE_AFTER_S = 0.05  # of waiting for a process: most conversations are rendered in far less, and a start takes seconds
LOOK_EVERY_S = 0.005  # whether one that was started is ready, while somebody waits
_NUM_PROBED = 40  # messages; none that is known shows the last few of a conversation only, or every other one
_TURNS = ("user", "assistant")
_MODULE = "jupyter_llmcloud.inference.openai.chat.template_process"


class TemplateFailed(Exception):
    """A template could not be rendered; the text says why."""


class _Process:
    """One process that renders. It is started at once, and waited for when it is needed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._is_ready = False
        self._ready_by = time.monotonic() + START_S

    @property
    def can_be_asked(self) -> bool:
        """Whether it has started: also in vain, or not in time, which is said to who asks it."""
        return self._is_ready or self._has_said_something() or self._left_s() == 0

    def _has_said_something(self) -> bool:
        assert self._process.stdout is not None
        waiting = select.poll()  # select itself takes no descriptor above 1023
        waiting.register(self._process.stdout, select.POLLIN)
        return bool(waiting.poll(0))

    def _left_s(self) -> float:
        return max(0.0, self._ready_by - time.monotonic())

    def render(self, asked: dict[str, Any]) -> str:
        """The text; raises TemplateFault, also when the process had to be ended: then `lives` is False."""
        assert self._process.stdin is not None
        try:
            if not self._is_ready:
                self._read(self._left_s())
                self._is_ready = True
            write_message(self._process.stdin, asked)
            reply = self._read(RENDER_S)
        except (EOFError, OSError, TimeoutError) as error:
            raise TemplateFailed(self._ending(error)) from None
        if "error" in reply:
            raise TemplateFailed(reply["error"])
        return str(reply["text"])

    def _read(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        return read_message(_TimedPipe(self._process.stdout.fileno(), time.monotonic() + timeout_s))

    def _ending(self, error: Exception) -> str:
        """Why there was no answer. The process is ended, if it was not already."""
        is_late = isinstance(error, TimeoutError)
        if is_late:
            self.kill()
        code = self._process.wait()
        if is_late or code == -signal.SIGXCPU:
            return f"it did not end within {CPU_S} s of processor time, and was ended"
        return f"it ended the process that rendered it (exit status {code})"

    @property
    def lives(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()


class _TimedPipe:
    """A pipe that is read until a deadline."""

    def __init__(self, descriptor: int, deadline: float) -> None:
        self._descriptor = descriptor
        self._deadline = deadline
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(self, size: int) -> bytes:
        """So many bytes; raises TimeoutError, and EOFError when there will be fewer."""
        data = bytearray()
        while len(data) < size:
            left_s = max(0.0, self._deadline - time.monotonic())
            if not self._poll.poll(1000 * left_s):
                raise TimeoutError
            if not (piece := os.read(self._descriptor, size - len(data))):
                raise EOFError
            data += piece
        return bytes(data)


class Templates:
    """Renders for many threads at once, each in a process of its own; a process that lives is used again.

    Who finds none that is free takes the first that is: one of another thread as a rule, else one that is started anew.
    """

    def __init__(self, max_processes: int = MAX_PROCESSES) -> None:
        self._max_processes = max_processes
        self._idle: list[_Process] = []  # also those that start
        self._used: set[_Process] = set()
        self._show_all: dict[str, bool] = {}
        self._changed = threading.Condition()
        self._closed = False

    def prepare(self) -> None:
        """Start a process before it is needed."""
        with self._changed:
            self._idle.append(_Process())

    def render(self, template: str, variables: dict[str, Any], messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation; raises TemplateFault. Blocks, for a bounded time."""
        with self._process() as process:
            return process.render({"template": template, "variables": variables, "messages": list(messages)})

    def shows_all(self, template: str, variables: dict[str, Any]) -> bool:
        """Whether a template writes every message of a user and of the assistant, as far as a small trial tells."""
        if template not in self._show_all:
            said = [f"said-{number}-" for number in range(_NUM_PROBED)]
            rows = [{"role": _TURNS[number % 2], "content": text} for number, text in enumerate(said)]
            try:
                text = self.render(template, variables, rows)
            except TemplateFailed:
                return False
            self._show_all[template] = all(one in text for one in said)
        return self._show_all[template]

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Process]:
        process = self._take()
        try:
            yield process
        finally:
            with self._changed:
                self._used.discard(process)
                if not self._closed:  # one that was ended has a successor, which starts meanwhile
                    self._idle.append(process if process.lives else _Process())
                self._changed.notify()

    def _take(self) -> _Process:
        """The first process that can be asked."""
        began = time.monotonic()
        with self._changed:
            while (process := self._free()) is None:
                is_starting = bool(self._idle)
                if not is_starting and self._may_start(time.monotonic() - began):
                    self._idle.append(_Process())
                self._changed.wait(LOOK_EVERY_S if is_starting else MORE_AFTER_S)
            self._used.add(process)
        return process

    def _free(self) -> _Process | None:
        if self._closed:
            raise TemplateFailed("the replica ends")
        process = next((one for one in reversed(self._idle) if one.can_be_asked), None)
        if process is not None:
            self._idle.remove(process)
        return process

    def _may_start(self, waited_s: float) -> bool:
        """Whether another process is worth its start, of who has waited so long for one."""
        return len(self._used) < self._max_processes and (not self._used or waited_s >= MORE_AFTER_S)

    def close(self) -> None:
        """End the processes, also those that render."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            processes = [*self._idle, *self._used]
            self._idle.clear()
        for process in processes:
            process.kill()
