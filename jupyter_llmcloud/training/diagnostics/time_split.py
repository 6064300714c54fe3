"""Where the time of this rank goes: computing, blocked in collectives, in data loaders, in checkpoints.

Only the main thread is measured, and only where it enters and leaves one of these: two looks at a clock each. What a
backward pass waits for its gradients in C++, no Python function shows; it is the time in which the thread neither
computed nor was kept from a processor.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jupyter_llmcloud.protocol.rank_messages import RankTimes
from jupyter_llmcloud.training import patches

Point = tuple[int, int, float]  # optimizer steps, collectives since then, seconds blocked until then

COMPUTE, BLOCKED, DATA, CHECKPOINT = range(4)
MAX_POINTS = 128  # in one message
ASLEEP_S = 50e-6  # what is shorter is no waiting
PRE_FORWARD_S = 100e-6
LONG_S = 0.5  # asleep in an exchange that is not over: from here on it is told as waiting


class StepTimes:
    """The times of one rank's cell. One per process."""

    def __init__(self) -> None:
        self._main = threading.main_thread().ident
        self._num_steps: Callable[[], int] = lambda: 0
        self._attempt = 0
        self._has_peers = False
        self._run_delay = _RunDelay()
        self._clear()

    def _clear(self) -> None:
        self._spent = [0.0, 0.0, 0.0, 0.0]
        self._now = COMPUTE
        self._since = time.perf_counter()
        self._step, self._number = 0, 0
        self._points: list[Point] = []
        self._exchange: tuple[float, float, float] | None = None  # as _exchanges keeps it

    def install(self, num_steps: Callable[[], int]) -> None:
        """Measure from now on. Called once, in a rank; `num_steps` tells the optimizer steps of the cell."""
        self._num_steps = num_steps
        self._main = threading.main_thread().ident
        patches.BLOCKED_TIME.apply(
            {
                "torch._C._distributed_c10d:Work.wait": self._blocks,
                "torch.distributed._functional_collectives:wait_tensor": self._blocks,
                "torch.nn.parallel:DistributedDataParallel._pre_forward": self._pre_forward,
                "torch.autograd:_engine_run_backward": self._backward,
            }
        )
        patches.DATA_TIME.apply({"torch.utils.data.dataloader:_BaseDataLoaderIter.__next__": self._loads})
        patches.CHECKPOINT_TIME.apply(dict.fromkeys(patches.CHECKPOINT_TIME.targets, self._saves))

    def begin(self, attempt: int, num_ranks: int) -> None:
        """A cell begins."""
        self._attempt, self._has_peers = attempt, num_ranks > 1
        self._clear()

    # --- the main thread ---

    def enter(self, what: int) -> int:
        """From now on this; returns what was before."""
        now, before = time.perf_counter(), self._now
        self._spent[before] += now - self._since
        self._now, self._since = what, now
        return before

    @contextlib.contextmanager
    def within(self, what: int) -> Iterator[None]:
        """All of the block is this, but for what is entered in it."""
        before = self.enter(what)
        try:
            yield
        finally:
            self.enter(before)

    def _passed(self) -> None:
        """A collective is over: a point that other ranks pass as well."""
        step = self._num_steps()
        self._number = self._number + 1 if step == self._step else 1
        self._step = step
        self._points.append((step, self._number, self._spent[BLOCKED]))
        if len(self._points) > 2 * MAX_POINTS:
            self._points = _thinned(self._points)

    def _in(self, what: int) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            enter, main, ident = self.enter, self._main, threading.get_ident

            def timed(*args: Any, **kwargs: Any) -> Any:
                if ident() != main:
                    return original(*args, **kwargs)
                before = enter(what)
                try:
                    return original(*args, **kwargs)
                finally:
                    enter(before)

            return timed

        return make

    def _loads(self, original: Any) -> Any:
        return self._in(DATA)(original)

    def _saves(self, original: Any) -> Any:
        return self._in(CHECKPOINT)(original)

    def _blocks(self, original: Any) -> Any:
        main, ident = self._main, threading.get_ident

        def wait(*args: Any, **kwargs: Any) -> Any:
            if ident() != main:
                return original(*args, **kwargs)
            before = self.enter(BLOCKED)
            try:
                return original(*args, **kwargs)
            finally:
                self.enter(before)
                self._passed()

        return wait

    def _pre_forward(self, original: Any) -> Any:
        """DDP exchanges buffers, and once its buckets, before the forward pass."""

        def _pre_forward(*args: Any, **kwargs: Any) -> Any:
            began, used = time.perf_counter(), time.thread_time()
            with self._exchanges(began, used):
                result = original(*args, **kwargs)
            if (took := time.perf_counter() - began) > PRE_FORWARD_S:
                self._slept(took - (time.thread_time() - used), 0.0)
            return result

        return _pre_forward

    def _backward(self, original: Any) -> Any:
        main, ident = self._main, threading.get_ident

        def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
            if not self._has_peers or ident() != main:
                return original(*args, **kwargs)
            began, used, delay = time.perf_counter(), time.thread_time(), self._run_delay()
            other = self._known()
            with self._exchanges(began, used):
                result = original(*args, **kwargs)
            idle = time.perf_counter() - began - (time.thread_time() - used)
            if idle > ASLEEP_S:
                self._slept(idle - (self._run_delay() - delay), self._known() - other)
            return result

        return _engine_run_backward

    def _known(self) -> float:
        return self._spent[BLOCKED] + self._spent[DATA] + self._spent[CHECKPOINT]

    @contextlib.contextmanager
    def _exchanges(self, began: float, used: float) -> Iterator[None]:
        """Within the block the main thread may wait for its peers in native code."""
        if not self._has_peers or threading.get_ident() != self._main:
            yield
            return
        before, self._exchange = self._exchange, (began, used, self._known())
        try:
            yield
        finally:
            self._exchange = before

    def _asleep_now(self, now: float) -> float:
        """How long the main thread has slept in an exchange that is not over; 0 where that is no long time."""
        exchange, main = self._exchange, self._main
        if exchange is None or main is None:
            return 0.0
        began, used, known = exchange
        computed = time.clock_gettime(time.pthread_getcpuclockid(main)) - used
        asleep = now - began - computed - (self._known() - known)
        return asleep if asleep > LONG_S else 0.0

    def _slept(self, asleep: float, known: float) -> None:
        """The thread was asleep for so long where only its peers can have kept it, `known` of it is counted."""
        before = self.enter(self._now)
        blocked = min(max(0.0, asleep - known), self._spent[before])
        if self._has_peers and threading.get_ident() == self._main:
            self._spent[before] -= blocked
            self._spent[BLOCKED] += blocked
            self._passed()

    # --- whoever tells of it ---

    def take(self) -> RankTimes:
        """What was spent until now, also by what the main thread is in; the points since the last time."""
        for _ in range(8):  # the main thread goes on meanwhile
            since, what, spent = self._since, self._now, list(self._spent)
            now = time.perf_counter()
            if since == self._since:
                break
        spent[what] += max(0.0, now - since)
        if what == COMPUTE and (asleep := min(self._asleep_now(now), spent[COMPUTE])):
            spent[COMPUTE] -= asleep
            spent[BLOCKED] += asleep
        points, self._points = self._points, []
        return RankTimes(
            attempt=self._attempt,
            spent=[round(seconds, 6) for seconds in spent],
            points=[(step, number, round(blocked, 6)) for step, number, blocked in _thinned(points)],
        )


class _RunDelay:
    """Seconds that the calling thread was ready and got no processor (Linux; else 0)."""

    def __init__(self) -> None:
        self._pid, self._fd = 0, -1

    def __call__(self) -> float:
        if self._pid != os.getpid():  # the file of the process that this one was forked from
            self._pid, self._fd = os.getpid(), _open_schedstat()
        if self._fd < 0:
            return 0.0
        try:
            return int(os.pread(self._fd, 64, 0).split()[1]) * 1e-9
        except (OSError, IndexError, ValueError):
            self._fd = -1
            return 0.0


def _open_schedstat() -> int:
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _thinned(points: list[Point]) -> list[Point]:
    """Few enough for a message, and the same ones on every rank: those whose numbers many twos divide."""
    has_many_steps = len({step for step, _, _ in points}) > MAX_POINTS // 2
    if has_many_steps:
        points = [point for point in points if point[1] == 1]
    stride = 1
    while len(points) > MAX_POINTS:
        stride *= 2
        if has_many_steps:
            points = [point for point in points if not point[0] % stride]
        else:
            points = [point for point in points if point[1] == 1 or not point[1] % stride]
    return points


TIMES = StepTimes()
