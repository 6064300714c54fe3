"""Tokens per second of the same training loop on two ranks, logging and printing every step, against torchrun."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench import launch
from tests.bench.measured import Row
from tests.bench.shell import Shell, product
from tests.bench.start import fresh

ROUNDS = 5
WARM_UP = 8
BODY = launch.BODIES / "train.py"


@dataclass(frozen=True)
class Report:
    """What one training told: tokens per second, CPU milliseconds of rank 0 per step, the last loss."""

    speed: float
    cpu_ms: float
    loss: float


def measure(folder: Path) -> list[Row]:
    """Rounds of both in turn; the first steps of each are left out, and both must end with the same loss."""
    ours: list[Report] = []
    theirs: list[Report] = []
    with product(folder / "ours") as shell:
        shell.run("%load_ext jupyter_llmcloud")
        for number in range(ROUNDS):
            with fresh(folder / f"ours-{number}") as place:
                ours.append(train_here(shell, place))
            with fresh(folder / f"peer-{number}") as place:
                theirs.append(train_under_torchrun(place))
            if abs(ours[-1].loss - theirs[-1].loss) > 1e-4:
                raise AssertionError(f"the losses differ, {ours[-1]} and {theirs[-1]}: not the same training")
    speed, cpu = (
        [[r.speed for r in both] for both in (ours, theirs)],
        [[r.cpu_ms for r in both] for both in (ours, theirs)],
    )
    return [
        Row(
            "throughput", "training, 3.9 M parameters, 2 ranks", "tokens/s", "torchrun", *speed, goal=1.0, at_least=True
        ),
        Row("throughput", "CPU of a rank per step, with its supervision", "ms", "torchrun", *cpu),
    ]


def train_here(shell: Shell, place: Path) -> Report:
    """The body as a cell of ours."""
    shell.run(f"BENCH_FOLDER = {str(place)!r}")
    shell.run(f"%%distribute -n 2 --name throughput --push BENCH_FOLDER\n{BODY.read_text()}")
    return _report(place)


def train_under_torchrun(place: Path) -> Report:
    """The body as a script."""
    with launch.started("torchrun", BODY, 2, place):
        pass
    return _report(place)


def _report(place: Path) -> Report:
    told = json.loads((place / "report.json").read_text())
    seconds, cpu_seconds = (median(told[name][WARM_UP:]) for name in ("seconds", "cpu_seconds"))
    return Report(told["tokens_per_step"] / seconds, 1000 * cpu_seconds, told["loss"])
