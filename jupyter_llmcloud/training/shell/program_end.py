"""What Python does when a program has come to its end, done for a script at the end of its run.

The rank lives on, or is left at once; a script counts on neither: threads and processes that it has not joined would be
cut off, `atexit` would never come (with it wandb closes its run), and files that it has not closed would lose what is
still in their buffers.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import gc
import io
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from jupyter_llmcloud.training import patches

JOIN_S = 0.1  # between two looks at a thread, in which an interrupt is heard
LOOKS = 2  # at a pool that rests: one that has just taken its work is not seen to have any


class ProgramEnd:
    """Of the script that a rank executes."""

    def __init__(self) -> None:
        self._is_active = False
        self._functions: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._threads: set[threading.Thread] = set()
        self._children: set[Any] = set()

    def install(self) -> None:
        """Hear from now on what scripts register. Called once, in a rank."""
        patches.AT_EXIT.apply({"atexit:register": self._register, "atexit:unregister": self._unregister})

    def begin(self) -> None:
        """A script begins."""
        self._is_active = True
        self._functions = []
        self._threads = set(threading.enumerate())
        self._children = set(multiprocessing.active_children())

    def come(self, waits: bool) -> None:
        """It has ended; `waits`: for what it has not joined, as after everything but a Stop."""
        try:
            if waits:
                self._join()
            self._call()
        finally:
            self._is_active = False
            self._threads, self._children = set(), set()
            _flush_files()

    def _join(self) -> None:
        threads = threading.enumerate()
        new: list[Any] = [thread for thread in threads if thread not in self._threads and not thread.daemon]
        new += [
            child for child in multiprocessing.active_children() if child not in self._children and not child.daemon
        ]
        num_looks = 0
        while num_looks < LOOKS and (alive := [one for one in new if one.is_alive()]):
            busy = [one for one in alive if not _is_at_rest(one)]
            num_looks = 0 if busy else num_looks + 1
            (busy or alive)[0].join(JOIN_S)

    def _call(self) -> None:
        while self._functions:
            function, arguments, options = self._functions.pop()
            try:
                function(*arguments, **options)
            except Exception:  # Python goes on with the next one, too
                traceback.print_exc()

    def _register(self, original: Any) -> Any:
        def register(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
            if not self._is_active:
                original(func, *args, **kwargs)
            else:
                self._functions.append((func, args, kwargs))
            return func

        return register

    def _unregister(self, original: Any) -> Any:
        def unregister(func: Callable[..., Any]) -> None:
            self._functions = [entry for entry in self._functions if entry[0] != func]
            original(func)

        return unregister


def _is_at_rest(one: Any) -> bool:
    """Whether it belongs to a pool that nobody has shut down and that has nothing to do: Python ends such by itself."""
    if not isinstance(one, threading.Thread):
        pools = [thread for thread in threading.enumerate() if _manages_processes(thread) and _is_at_rest(thread)]
        return any(one.pid in getattr(pool, "processes", ()) for pool in pools)
    if _manages_processes(one):
        return not getattr(one, "pending_work_items", None)
    frame = sys._current_frames().get(one.ident or 0)
    code = frame.f_code if frame is not None else None
    return code is not None and code.co_name == "_worker" and code.co_filename == concurrent.futures.thread.__file__


def _manages_processes(thread: threading.Thread) -> bool:
    return type(thread).__name__ == "_ExecutorManagerThread"  # of concurrent.futures and of joblib's loky


def _flush_files() -> None:
    for found in gc.get_objects():
        # By its own type: a weak proxy, such as torch.compile leaves behind, asks an object that may be gone.
        if issubclass(type(found), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with contextlib.suppress(Exception):  # closed, detached, or its disk is full
                found.flush()


def end_fork(error: BaseException | None, drawn: Iterable[str]) -> NoReturn:
    """End this process, a fork that a cell has made, as Python ends a program that `error`, if any, has left."""
    is_exit = isinstance(error, SystemExit)
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    elif error is not None and not is_exit:
        print(*drawn, sep="\n", file=sys.stderr)
    _flush_files()
    os._exit((code or 0) & 0xFF if isinstance(code, int | None) else 1)


PROGRAM_END = ProgramEnd()
