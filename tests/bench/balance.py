"""Rows per second of two ranks, one of which is slowed to half its speed: `--balance` beside equal shares.

The slow rank is stopped for half of the time, in turns of some milliseconds, as cpulimit does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
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
    """Rounds of both in turn, on the same ranks and the same batches."""
    speeds: dict[str, list[float]] = {"": [], "--balance": []}
    shares: list[float] = []
    with product(folder / "ours") as shell:
        shell.run("%load_ext jupyter_llmcloud")
        shell.run("%%distribute -n 2\npass")
        for number in range(ROUNDS):
            told = {option: _train(shell, option, folder / f"{number}{option}") for option in speeds}
            for option, ranks in told.items():
                speeds[option].append(_rows_per_second(ranks))
            shares.append(100 * _late(told["--balance"][SLOW]["rows"]) / _late_rows(told["--balance"]))
            _check_losses(told[""], told["--balance"])
    what = "2 ranks, one at half speed: rows trained per second"
    return [
        Row("balance", what, "rows/s", "equal shares", speeds["--balance"], speeds[""], 1.3, at_least=True),
        Row("balance", "share of the slow rank", "%", "", shares),
    ]


def _train(shell: Shell, option: str, place: Path) -> list[dict[str, Any]]:
    place.mkdir(parents=True)
    shell.begin(f"%%distribute -n 2 --name uneven {option}\nBENCH_FOLDER = {str(place)!r}\n{BODY.read_text()}")
    with _slowed(place / f"pid-{SLOW}"):
        shell.finish()
    return [json.loads((place / f"report-{rank}.json").read_text()) for rank in range(2)]


@contextlib.contextmanager
def _slowed(told: Path) -> Iterator[None]:
    """Have the process whose pid is written there run half of the time, from then on."""
    ended = threading.Event()

    def slow() -> None:
        while not (told.exists() and told.read_text()):
            if ended.wait(TURN_S):
                return
        pid = int(told.read_text())
        with contextlib.suppress(ProcessLookupError):
            while not ended.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(TURN_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(TURN_S)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
