"""Tokens per second of the same training loop on two ranks, logging and printing every step, under four launchers.

What supervision costs of it is measured by the CPU, not by the clock: see `supervision`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import launch, supervision
from tests.bench.measured import Row
from tests.bench.notebooks import IPYPARALLEL
from tests.bench.shell import Shell, product
from tests.bench.start import fresh

ROUNDS = 5
LAUNCHERS = ("torchrun", "notebook_launcher")
PEERS = (*LAUNCHERS, IPYPARALLEL.name)
ELASTIC = "%%distribute --name elastic --elastic 1:2\n"
BODY = launch.BODIES / "train.py"


@dataclass(frozen=True)
class Training:
    """What the ranks of one training told, in order; see bodies/train.py."""

    ranks: list[dict[str, Any]]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.ranks[0]["tokens_per_step"] / self._median("seconds")

    @property
    def cpu_ms(self) -> float:
        """CPU of the main thread of rank 0 per step."""
        return 1000 * self._median("cpu_seconds")

    def _median(self, name: str) -> float:
        return median(self.ranks[0][name][self.ranks[0]["warm_up"] :])


def measure(folder: Path) -> list[Row]:
    """Rounds of all in turn; the first steps of each are left out, and all must end with the same loss."""
    trainings: dict[str, list[Training]] = {name: [] for name in ("ours", "elastic", *PEERS)}
    with product(folder / "ours") as shell, IPYPARALLEL.shell(folder / "ipyparallel") as peer_shell:
        shell.run("%load_ext jupyter_llmcloud")
        shell.run("%%distribute -n 2\npass")
        IPYPARALLEL.begin(peer_shell)
        for number in range(ROUNDS):
            with fresh(folder / f"round-{number}") as place:
                trainings["ours"].append(train_in(shell, "%%distribute --name throughput\n", place / "ours"))
                trainings["elastic"].append(train_in(shell, ELASTIC, place / "elastic"))
                for peer in LAUNCHERS:
                    trainings[peer].append(train_under(peer, place / peer))
                trainings[IPYPARALLEL.name].append(train_in(peer_shell, IPYPARALLEL.heading, place / "ipyparallel"))
            _check_losses({name: done[-1] for name, done in trainings.items()})
    return _rows(trainings)


def _check_losses(last: dict[str, Training]) -> None:
    losses = {name: training.ranks[0]["loss"] for name, training in last.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise AssertionError(f"the losses differ: {losses}. Not the same training")


def _rows(trainings: dict[str, list[Training]]) -> list[Row]:
    speeds = {name: [training.speed for training in done] for name, done in trainings.items()}
    cpu = {name: [training.cpu_ms for training in done] for name, done in trainings.items()}
    what = "training, 3.9 M parameters, 2 ranks"
    goals = {"torchrun": 1.0}
    return [
        *(
            Row("throughput", what, "tokens/s", peer, speeds["ours"], speeds[peer], goals.get(peer), at_least=True)
            for peer in PEERS
        ),
        Row(
            "throughput",
            "the same with --elastic 1:2, which saves by itself",
            "tokens/s",
            "torchrun",
            speeds["elastic"],
            speeds["torchrun"],
            0.97,
            at_least=True,
        ),
        Row("throughput", "CPU of a rank's main thread per step", "ms", "torchrun", cpu["ours"], cpu["torchrun"]),
        *supervision.rows(*([done.ranks for done in trainings[name]] for name in ("ours", "torchrun"))),
    ]


def train_in(shell: Shell, heading: str, place: Path) -> Training:
    """The body as a cell of a notebook."""
    place.mkdir()
    shell.run(f"{heading}BENCH_FOLDER = {str(place)!r}\n{BODY.read_text()}")
    return _told(place)


def train_under(peer: str, place: Path) -> Training:
    """The body as a script."""
    place.mkdir()
    with launch.started(peer, BODY, 2, place):
        pass
    return _told(place)


def _told(place: Path) -> Training:
    return Training([json.loads((place / f"report-{rank}.json").read_text()) for rank in range(2)])
