"""Whether a rank's process works: how long its main thread has stood still, and what the process uses meanwhile."""

from __future__ import annotations

import contextlib
import os
import time

BUSY_FRACTION = 0.01  # of a core: the process works; one that only polls uses less
BUSY_BYTES = 100_000  # read or written in a second: it works as well
CLOSE_S = 1.0  # one that stands still for so long is looked at closely


class Stillness:
    """Since when something looks the same. Time is an argument, in seconds of one clock.

    Attributes:
        since: when it was last seen to change.
    """

    def __init__(self, now: float) -> None:
        self.since = now
        self._fingerprint: object = None

    def seconds(self, fingerprint: object, now: float) -> float:
        """How long it has looked like this, as far as was seen."""
        if fingerprint != self._fingerprint:
            self._fingerprint, self.since = fingerprint, now
        return now - self.since


class ProcessActivity:
    """Whether this process has computed, read or written of late. Times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._used: tuple[float, float, int] | None = None
        self._busy = False

    @property
    def has_begun(self) -> bool:
        """Whether it measures."""
        return self._used is not None

    def begin(self, now: float) -> None:
        """Measure from now on."""
        self._used = (now, time.process_time(), _bytes_moved())

    def is_busy(self, now: float, with_children: bool) -> bool:
        """Whether it was busy since the last look, which lies at least `CLOSE_S` back.

        Args:
            with_children: count the processor time of child processes as well (workers of a DataLoader).
        """
        began, cpu_s, moved = self._used or (now, 0.0, 0)
        if now - began > CLOSE_S:
            used_s, moved_now = time.process_time(), _bytes_moved()
            used_s += _children_cpu() if with_children else 0.0
            self._used = (now, used_s, moved_now)
            span_s = now - began
            self._busy = used_s - cpu_s > BUSY_FRACTION * span_s or moved_now - moved > BUSY_BYTES * span_s
        return self._busy


def _bytes_moved() -> int:
    """What this process has read and written so far."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return int(file.readline().split()[1]) + int(file.readline().split()[1])
    except OSError:
        return 0


def _children_cpu() -> float:
    """Seconds that living children (workers of a DataLoader) have used."""
    ticks = 0
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
                children = file.read().split()
            for pid in children:
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{pid}/stat", "rb") as file,
                ):  # a name may be cut in the middle of a character
                    ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")
