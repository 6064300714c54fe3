"""SIGTERM in a rank, which may be meant for it alone or for all: a batch system that takes a place away sends it to
every process there, and ends them half a minute later.

The agent tells which: one that is told to end itself says so to its ranks, which then go on until their state is saved.
A rank that hears nothing of that ends, as by the signal. Workers of data loaders go on with their rank.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.training import patches

PATIENCE_S = 2.0  # after which a rank was told to end alone


class Termination:
    """Of one rank. The signal's handler runs in the main thread, which may be blocked; `is_due` is asked by another."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._told, self._write = os.pipe()
        for fd in (self._told, self._write):
            os.set_blocking(fd, False)
        self._since: float | None = None
        self._is_held = False
        self._mask = _MaskedSigterm()

    def install(self) -> None:
        """Hear the signal from now on. Called once, in a rank."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # Blocked while it forks: a signal that reached the child before its first instruction would be forgotten, since
        # Python clears there what its parent's handler had noted.
        os.register_at_fork(
            before=self._mask.block, after_in_parent=self._mask.restore, after_in_child=self._leave_child_alone
        )
        LoaderWorker().install()

    @property
    def fd(self) -> int:
        """Readable when the signal has come."""
        return self._told

    def hold(self) -> None:
        """The agent is told to end, too: it says when."""
        self._is_held = True

    def left_s(self) -> float | None:
        """Until this rank ends by the signal; None when it does not."""
        incoming = select.poll()  # a training may have more files open than `select` has numbers
        incoming.register(self._told, select.POLLIN)
        if self._since is None and incoming.poll(0):
            os.read(self._told, 64)
            self._since = time.monotonic()
        if self._since is None or self._is_held:
            return None
        return max(0.0, self._since + PATIENCE_S - time.monotonic())

    def end(self) -> None:
        """End this process by the signal, or by force where its main thread does not come to handle it."""
        self._is_held = False
        self._since = -PATIENCE_S  # from now on the handler does what the signal asks
        os.kill(self._pid, signal.SIGTERM)
        time.sleep(PATIENCE_S)
        os.kill(self._pid, signal.SIGKILL)

    def _on_sigterm(self, *_: Any) -> None:
        me = os.getpid()
        if me != self._pid or (self._since is not None and self._since < 0):  # a child that was forked just now
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(me, signal.SIGTERM)
            return
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b".")

    def _leave_child_alone(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._mask.restore()


class _MaskedSigterm(threading.local):
    """SIGTERM is blocked in the thread that forks, from before it does until both processes are ready for it."""

    def __init__(self) -> None:
        self._before: list[set[int]] = []

    def block(self) -> None:
        self._before.append(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}))

    def restore(self) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before.pop())


class LoaderWorker:
    """A worker of a data loader: one whose loader has not said that it is done waits for that, or for its rank's end.

    torch has it end by any SIGTERM, in a handler of its own.
    """

    def __init__(self) -> None:
        self._done: Any = None  # the event by which the loader says so; in a worker

    def install(self) -> None:
        """Called once, in a rank: its forked workers inherit it."""
        patches.LOADER_WORKERS.apply(
            {
                "torch.utils.data._utils.worker:_worker_loop": self._knowing_its_loader,
                "torch.utils.data._utils.signal_handling:_set_worker_signal_handlers": self._with_ours,
            }
        )

    def _knowing_its_loader(self, original: Callable[..., None]) -> Callable[..., None]:
        def _worker_loop(*args: Any, **kwargs: Any) -> None:
            self._done = args[4] if len(args) > 4 else kwargs["done_event"]
            original(*args, **kwargs)

        return _worker_loop

    def _with_ours(self, original: Callable[[], None]) -> Callable[[], None]:
        def set_handlers() -> None:
            original()
            signal.signal(signal.SIGTERM, self._on_sigterm)

        return set_handlers

    def _on_sigterm(self, *_: Any) -> None:
        if self._done is None or self._done.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
