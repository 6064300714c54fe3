"""A side thread that says what the main thread of a rank is doing, also while that is blocked in C++.

While a cell runs it looks twice a second, and tells the agent when something has changed, at least every two seconds.
It holds no lock while it looks and wakes for nothing between cells.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.core.run.hang import heartbeat_s
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import Heartbeat, RankStacks
from jupyter_llmcloud.training.diagnostics import stack_location
from jupyter_llmcloud.training.diagnostics.activity import CLOSE_S, ProcessActivity, Stillness
from jupyter_llmcloud.training.diagnostics.flight_recorder import Collectives, GroupRow, as_sent
from jupyter_llmcloud.training.diagnostics.grad_mode import WithoutGradients
from jupyter_llmcloud.training.diagnostics.memory_left import available, of_device, resident
from jupyter_llmcloud.training.diagnostics.stack_location import CellNumber, StackLocation
from jupyter_llmcloud.training.diagnostics.time_split import TIMES
from jupyter_llmcloud.training.output.sender import OutputSender

TICK_S = 0.5
SPACING_S = 1.0  # a rank that moves is not worth more messages than this
MOVED_S = 2.0  # a rank that moved so recently works
DUMP_NAME = "llmcloud-stacks"  # of the memory file into which SIGUSR1 writes, with the thread that gets the signal

_NAMED = {"backward": "the gradient all_reduce of backward", "ddp": "DDP's exchange of buffers"}


class Watchdog:
    """One per rank.

    Args:
        num_steps: how many optimizer steps the cell has finished.
        cell_number: the execution count of a notebook cell, by the name of its file.
    """

    def __init__(self, sender: OutputSender, num_steps: Callable[[], int], cell_number: CellNumber) -> None:
        self.collectives = Collectives()
        self._without_gradients = WithoutGradients()
        self._sender = sender
        self._num_steps = num_steps
        self._cell_number = cell_number
        self._active = threading.Event()
        self._run_id = ""
        self._heartbeat_s = 2.0
        self._forget()

    def start(self) -> None:
        """Begin to watch; groups made from now on are counted."""
        self.collectives.watch()
        self._without_gradients.watch()
        threading.Thread(target=self._watch, name="llmcloud-watchdog", daemon=True).start()

    def begin(self, run_id: str, floor_s: float) -> None:
        """A cell begins; `floor_s` is when a rank may first be called late."""
        self._run_id = run_id
        self._heartbeat_s = heartbeat_s(floor_s)
        self._forget()
        self._active.set()

    def end(self) -> None:
        """The cell has ended."""
        self._active.clear()

    def _forget(self) -> None:
        self._stillness = Stillness(time.monotonic())
        self._without_gradients.depth = 0
        self._activity = ProcessActivity()  # begun by the side thread: a cell must not wait
        self._said_at = 0.0

    # --- looking ---

    def _watch(self) -> None:
        self._dump, is_told = _open_dump(), False
        while True:
            self._active.wait()
            if not self._activity.has_begun:
                self._activity.begin(time.monotonic())
            time.sleep(min(TICK_S, self._heartbeat_s / 2))
            if not self._active.is_set():
                continue
            now = time.monotonic()
            try:
                if self._is_due(now, self._still(now, self.collectives.state())):
                    self._say(self.look())
            except OSError:
                return  # the agent has gone; the control thread ends this process
            except Exception:  # of what the main thread changes meanwhile, as a group that it destroys: looked at again
                if not is_told:
                    traceback.print_exc(file=sys.__stderr__)
                is_told = True

    def _is_due(self, now: float, still_s: float) -> bool:
        """Whether to say something: the thread has moved, has just come to rest, or it is time for a sign of life."""
        silent_s = now - self._said_at
        if silent_s >= self._heartbeat_s:
            return True
        came_to_rest = still_s >= CLOSE_S > self._said_at - self._stillness.since
        return silent_s >= SPACING_S and (still_s < silent_s or came_to_rest)

    def look(self) -> Heartbeat:
        """What the main thread is doing now."""
        now = time.monotonic()
        groups = self.collectives.state()
        still_s = self._still(now, groups)
        at = stack_location.locate(stack_location.main_frame(), self._cell_number, closely=still_s > CLOSE_S)
        op = _operation(at, groups, still_s)
        return Heartbeat(
            run_id=self._run_id,
            phase="collective" if op else self._phase(at),
            op=op,
            groups=as_sent(groups),
            step=self._num_steps(),
            place=at.place,
            doing=at.doing,
            still_s=round(still_s, 2),
            working=still_s < MOVED_S or self._activity.is_busy(now, with_children=at.phase == "data"),
        )

    def _still(self, now: float, groups: dict[str, GroupRow]) -> float:
        """Seconds since the main thread moved, as far as was seen."""
        fingerprint = (stack_location.fingerprint(stack_location.main_frame()), self._num_steps(), groups)
        return self._stillness.seconds(fingerprint, now)

    def _phase(self, at: StackLocation) -> str:
        in_step = at.op in _NAMED
        return "evaluation" if at.phase == "compute" and self._without_gradients.depth and not in_step else at.phase

    def _say(self, heartbeat: Heartbeat) -> None:
        self._said_at = time.monotonic()
        memory = {"rss": resident(), "available": available(), "device_memory": of_device()}
        self._sender.send(replace(heartbeat, **memory, times=TIMES.take()))

    # --- stacks ---

    def stacks(self) -> RankStacks:
        """Of every thread but our own."""
        heartbeat = self.look()
        number = (
            next((f" #{row[1]}" for row in heartbeat.groups.values() if row[1] > row[2]), "") if heartbeat.op else ""
        )
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        found: dict[str, list[str]] = {}
        for ident, frame in sys._current_frames().items():
            name = names.get(ident, f"thread {ident}")
            if not name.startswith("llmcloud-") and name != "MainThread":
                found[name] = stack_location.stack(frame, self._cell_number)
        main = stack_location.stack(stack_location.main_frame(), self._cell_number) if self._active.is_set() else []
        return RankStacks(main=main, threads=found, op=heartbeat.op + number)


def _operation(at: StackLocation, groups: dict[str, GroupRow], still_s: float) -> str:
    """The collective that the main thread is blocked in; "" for none."""
    in_flight = any(begun > finished for _, begun, finished in groups.values())
    if at.op and at.op not in _NAMED:
        return at.op
    if not in_flight or still_s < CLOSE_S / 2:
        return ""  # autograd computes, or an asynchronous collective goes on beside the main thread
    return _NAMED.get(at.op, "a collective")


def _open_dump() -> Any:
    """Have SIGUSR1 write all stacks into a memory file, also while native code holds the interpreter's lock.

    Called in the thread that is to get the signal.
    """
    if not hasattr(os, "memfd_create"):
        return None
    file = os.fdopen(os.memfd_create(f"{DUMP_NAME}-{threading.get_native_id()}"), "wb", buffering=0)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    return file
