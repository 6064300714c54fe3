"""A Stop of a cell that catches interrupts as it catches everything."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from jupyter_llmcloud.training.shell.interrupts import PATIENCE_S, Interrupts
from tests.support.worlds import AgentProcess, Outcome, Ranks, alive, until

# The rank is in `sleep` when a signal comes, hardly ever in a handler.
ENDLESS = {
    "a loop that skips what fails": """
        while True:
            try:
                time.sleep(1)
            except:
                continue
    """,
    "a function that suppresses everything": """
        def train():
            for _ in range(10**9):
                with contextlib.suppress(BaseException):
                    time.sleep(1)
        train()
    """,
    "a loop within a loop, each of which keeps what fails": """
        errors = []
        while True:
            try:
                while True:
                    try:
                        time.sleep(1)
                    except BaseException as error:
                        errors.append(error)
            except BaseException as error:
                errors.append(error)
    """,
}


@pytest.fixture(scope="module")
def stopped(node_agent: AgentProcess) -> Iterator[dict[str, tuple[Ranks, Outcome]]]:
    """Worlds whose cells did not end at the first interrupt; stopped at the same time, since that is slow."""
    worlds = {name: Ranks(node_agent) for name in ENDLESS}
    begin = "import contextlib, time\nkept_over_all = 7\nprint('in it')\n"
    running = [world.send(begin + textwrap.dedent(ENDLESS[name])).wait_for("in it") for name, world in worlds.items()]
    for cell in running:
        cell.stop()
    yield {name: (cell.ranks, cell.end()) for name, cell in zip(worlds, running, strict=True)}
    for world in worlds.values():
        world.end()


@pytest.mark.alone
@pytest.mark.parametrize("loop", ENDLESS)
def test_a_stop_ends_a_cell_that_catches_everything_and_keeps_its_variables(
    stopped: dict[str, tuple[Ranks, Outcome]], loop: str
) -> None:
    world, outcome = stopped[loop]
    assert "ranks 0-1: stopped, variables kept" in outcome.report
    assert world.ok("import sys\nkept_over_all, sys.gettrace(), sys.getprofile()").results() == ["(7, None, None)"] * 2


PROCESSES = """
import multiprocessing, signal, subprocess, time
context = multiprocessing.get_context("fork")

def deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(1000)

own = context.Process(target=deaf)
worker = context.Process(target=time.sleep, args=(1000,), daemon=True)
own.start(), worker.start()
program = subprocess.Popen(["sleep", "1000"])
server = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print("pids", own.pid, program.pid, worker.pid, server.pid)
program.wait()
"""


def test_a_stop_is_for_the_processes_that_the_cell_has_started_but_for_workers_and_servers(world: Ranks) -> None:
    stopped = world.send(PROCESSES, ranks=[0]).wait_for("pids").stop().end()
    own, program, worker, server = map(int, re.findall(r"\d+", stopped.text(0)))
    until(lambda: not alive(own) and not alive(program), "the processes of the cell have ended")
    assert alive(worker) and alive(server)
    os.kill(server, 9)
    world.ok("worker.kill(), worker.join(), server.wait()", ranks=[0])


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = signal.getsignal(signal.SIGINT)
    yield Interrupts(lambda _: True, lambda: False)
    signal.signal(signal.SIGINT, before)


def test_a_stop_leaves_no_lock_of_a_queue_taken(interrupts: Interrupts) -> None:
    lock = threading.Lock()
    condition = threading.Condition(lock)  # as that of a loader's queue
    for number in range(60):
        interrupts.begin()
        pressing = threading.Timer(0.0002 * (number % 10), interrupts.press)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                with condition:
                    sum(range(100))
        interrupts.end()
        pressing.join()
        assert not lock.locked(), f"interrupt {number}"


def test_a_stop_ends_a_wait_for_a_lock(interrupts: Interrupts) -> None:
    interrupts.begin()
    threading.Timer(0.01, interrupts.press).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        threading.Event().wait(60)
    interrupts.end()
    assert time.monotonic() - began < 30


class _Closing:
    """As a pass over a loader with workers: its end waits for them."""

    def __init__(self, closing_s: float, entered: threading.Event) -> None:
        self._closing_s, self._entered = closing_s, entered

    def __del__(self) -> None:
        self._entered.set()
        time.sleep(self._closing_s)


@pytest.mark.parametrize("closing_s", [0.1, 30.0], ids=["soon", "late"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_is_not_lost_in_what_python_does_with_objects_that_nobody_has(
    interrupts: Interrupts, closing_s: float
) -> None:
    entered = threading.Event()
    interrupts.begin()
    pressing = threading.Thread(target=lambda: (entered.wait(), interrupts.press()))
    pressing.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        held = _Closing(closing_s, entered)
        del held
        while time.monotonic() - began < PATIENCE_S - 1:
            time.sleep(0.01)
    interrupts.end()
    pressing.join()
