"""What logging a dict of five floats costs the training loop, and what is left of it when the process is killed.

`run.log` is called on rank 0 of a real world, in a cell; every other writer in the main thread of a process of its own,
with the same lines. In a row, which is what the goal is about, and with pauses of two milliseconds, after which every
writer finds its code and data gone from the processor's caches. Then each logs as fast as
it can and is killed with SIGKILL as soon as the last call has returned: who has not written yet has lost it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.bench import launch, peers, screen, writers
from tests.bench.measured import Row
from tests.bench.peers import PeerMissing
from tests.bench.shell import REPOSITORY, CellFailed, Shell, peer_shell, product
from tests.bench.start import fresh

ROUNDS = 5
NUM_VALUES = 2000
CALLS = (launch.BODIES / "log_calls.py").read_text()
DIE = (launch.BODIES / "log_and_die.py").read_text()
JSON = "a flushed JSON line"
COUNTED = (JSON, "TensorBoard", "TensorBoard, flushed as by Accelerate", "trackio")
_OURS = "LOG = lambda values, step: run.log(values, step=step)\n"
_THEIRS = """\
import pathlib
from tests.bench import writers
LOG = writers.WRITERS[{name!r}](pathlib.Path({folder!r}))
"""
Calls = dict[str, list[float]]  # "tight" and "paced": microseconds


def measure(folder: Path) -> list[Row]:
    """Rounds of every writer in turn, then one that is killed."""
    missing = _missing()
    present = [name for name in writers.WRITERS if name not in missing]
    calls: dict[str, Calls] = {name: {"tight": [], "paced": []} for name in ("ours", *writers.WRITERS)}
    with product(folder / "ours") as shell:
        shell.run("%load_ext jupyter_llmcloud")
        shell.run("%%distribute -n 2\npass")
        with contextlib.ExitStack() as stack:
            others = {name: _start(stack, name, folder / f"peer-{number}") for number, name in enumerate(present)}
            for _ in range(ROUNDS):
                _round(shell, "%%distribute --ranks 0\n" + _OURS, folder, calls["ours"])
                for name, other in others.items():
                    _round(other, "", folder, calls[name])
        kept = _killed_rank(shell, folder)
    lost = {
        name: [NUM_VALUES - _killed(name, folder / f"killed-{number}")]
        for number, name in enumerate(COUNTED)
        if name in present
    }
    return [
        *_call_rows(calls, missing),
        *screen.measure(folder / "screen"),
        *_lost_rows(NUM_VALUES - kept, lost, missing),
    ]


def _missing() -> dict[str, str]:
    reasons: dict[str, str] = {}
    for name, package in writers.PACKAGES.items():
        try:
            peers.python_with(package)
        except PeerMissing as reason:
            reasons[name] = str(reason)
    return reasons


def _python(name: str) -> Path:
    return peers.python_with(writers.PACKAGES[name]) if name in writers.PACKAGES else Path(sys.executable)


def _start(stack: contextlib.ExitStack, name: str, folder: Path) -> Shell:
    folder.mkdir(parents=True)
    shell = stack.enter_context(peer_shell(folder, _python(name), launch.CPU))
    shell.run(_THEIRS.format(name=name, folder=str(folder)))
    return shell


def _round(shell: Shell, heading: str, folder: Path, calls: Calls) -> None:
    with fresh(folder / "round") as place:
        shell.run(f"{heading}BENCH_FOLDER = {str(place)!r}\n{CALLS}")
        told = json.loads((place / "calls.json").read_text())
    for pace, samples in calls.items():
        samples += [spent / 1000 for spent in told[pace]]


def _call_rows(calls: dict[str, Calls], missing: dict[str, str]) -> list[Row]:
    titles = {"tight": "log five floats, in a row", "paced": "log five floats, every 2 ms"}
    return [
        Row(
            "logging",
            title,
            "us",
            name,
            calls["ours"][pace],
            calls[name][pace],
            0.3 if name == JSON and pace == "tight" else None,
            missing=missing.get(name, ""),
        )
        for pace, title in titles.items()
        for name in writers.WRITERS
    ]


# --- kill -9 ---


def _killed_rank(shell: Shell, folder: Path) -> int:
    """How many values the journal of a run has whose rank was killed."""
    with contextlib.suppress(CellFailed):  # RankError: that a rank was lost is what this cell is for
        shell.run(f"%%distribute --ranks 0 --name killed\nNUM_VALUES = {NUM_VALUES}\n{_OURS}{DIE}")
    (journal,) = (folder / "ours" / "root" / "runs").glob("killed-*/metrics/rank-0000.jsonl")
    return sum("values" in json.loads(line) for line in journal.read_text().splitlines())


def _killed(name: str, folder: Path) -> int:
    folder.mkdir(parents=True)
    python = str(_python(name))
    program = f"NUM_VALUES = {NUM_VALUES}\n{_THEIRS.format(name=name, folder=str(folder))}{DIE}"
    died = subprocess.run([python, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if died.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the process of {name} ended with {died.returncode}:\n{died.stderr[-2000:]}")
    counting = [python, "-m", "tests.bench.writers", name, str(folder)]
    done = subprocess.run(counting, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"what {name} has written could not be counted:\n{done.stderr[-2000:]}")
    return int(done.stdout)


def _lost_rows(ours: int, theirs: dict[str, list[int]], missing: dict[str, str]) -> list[Row]:
    what = f"values lost of {NUM_VALUES} on kill -9"
    limits = {JSON: 0.0}  # said once
    return [
        Row(
            "logging",
            what,
            "",
            name,
            [ours],
            theirs.get(name, []),
            limit=limits.get(name),
            missing=missing.get(name, ""),
        )
        for name in COUNTED
    ]
