"""Rows per second of two ranks, one of which is slowed to half its speed: `--balance` beside equal shares.

The slow rank is stopped for half of the time, in turns of some milliseconds, as cpulimit does it; or it shares its
core with a process that never waits, which gets half of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.bench import launch
from tests.bench.measured import Row
from tests.bench.shell import Shell, product

ROUNDS = 3
TURN_S = 0.01
SLOW = 1  # the rank
BODY = launch.BODIES / "uneven.py"
MAX_DIFFERENCE = 0.01  # of the losses


def measure(folder: Path) -> list[Row]:
    """Rounds of both in turn, on the same ranks and the same batches, with each way to be slow."""
    rows: list[Row] = []
    with product(folder / "ours") as shell:
        shell.run("%load_ext jupyter_llmcloud")
        shell.run("%%distribute -n 2\npass")
        for what, slowed in WAYS.items():
            rows += _measure(shell, what, slowed, folder / what.replace(" ", "-"))
    return rows


def _measure(shell: Shell, what: str, slowed: Slowed, folder: Path) -> list[Row]:
    speeds: dict[str, list[float]] = {"": [], "--balance": []}
    shares: list[float] = []
    for number in range(ROUNDS):
        told = {option: _train(shell, option, slowed, folder / f"{number}{option}") for option in speeds}
        for option, ranks in told.items():
            speeds[option].append(_rows_per_second(ranks))
        shares.append(100 * _late(told["--balance"][SLOW]["rows"]) / _late_rows(told["--balance"]))
        _check_losses(told[""], told["--balance"])
    named = f"2 ranks, one {what}: rows trained per second"
    return [
        Row("balance", named, "rows/s", "equal shares", speeds["--balance"], speeds[""], 1.3, at_least=True),
        Row("balance", f"share of the one {what}", "%", "", shares),
    ]


def _train(shell: Shell, option: str, slowed: Slowed, place: Path) -> list[dict[str, Any]]:
    place.mkdir(parents=True)
    shell.begin(f"%%distribute -n 2 --name uneven {option}\nBENCH_FOLDER = {str(place)!r}\n{BODY.read_text()}")
    with slowed(place):
        shell.finish()
    return [json.loads((place / f"report-{rank}.json").read_text()) for rank in range(2)]


@contextlib.contextmanager
def _meanwhile(slow: Callable[[list[int], threading.Event], None], place: Path) -> Iterator[None]:
    """Do that with the processes of both ranks, from the time at which they have written their pids there."""
    ended = threading.Event()
    told = [place / f"pid-{rank}" for rank in range(2)]

    def wait() -> None:
        while not all(path.exists() and path.read_text() for path in told):
            if ended.wait(TURN_S):
                return
        slow([int(path.read_text()) for path in told], ended)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _stopped_half_of_the_time(place: Path) -> AbstractContextManager[None]:
    def slow(pids: list[int], ended: threading.Event) -> None:
        with contextlib.suppress(ProcessLookupError):
            while not ended.is_set():
                os.kill(pids[SLOW], signal.SIGSTOP)
                time.sleep(TURN_S)
                os.kill(pids[SLOW], signal.SIGCONT)
                time.sleep(TURN_S)

    return _meanwhile(slow, place)


def _with_a_busy_neighbour(place: Path) -> AbstractContextManager[None]:
    """Each rank has a core of its own, and the slow one's a process that never waits."""

    def slow(pids: list[int], ended: threading.Event) -> None:
        every = sorted(os.sched_getaffinity(0))
        for rank, pid in enumerate(pids):
            _pin(pid, {every[rank]})
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            os.sched_setaffinity(neighbour.pid, {every[SLOW]})
            ended.wait()
        finally:
            neighbour.kill()
            neighbour.wait()
            for pid in pids:
                _pin(pid, set(every))

    return _meanwhile(slow, place)


def _pin(pid: int, cores: set[int]) -> None:
    """All threads of a process: those that it starts later have the core of the one that starts them."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


Slowed = Callable[[Path], AbstractContextManager[None]]
WAYS: dict[str, Slowed] = {
    "at half speed": _stopped_half_of_the_time,
    "beside a busy neighbour": _with_a_busy_neighbour,
}


def _late(values: list[float]) -> float:
    return sum(values[len(values) // 2 :])


def _late_rows(ranks: list[dict[str, Any]]) -> float:
    return sum(_late(rank["rows"]) for rank in ranks)


def _rows_per_second(ranks: list[dict[str, Any]]) -> float:
    """Once the shares have settled."""
    return _late_rows(ranks) / max(_late(rank["seconds"]) for rank in ranks)


def _check_losses(*trainings: list[dict[str, Any]]) -> None:
    found = [sum(_late(rank["losses"]) for rank in ranks) / _late_rows(ranks) for ranks in trainings]
    if abs(found[0] - found[1]) > MAX_DIFFERENCE * found[0]:
        raise AssertionError(f"the losses differ: {found}. Not the same training")
