"""Tokens per second of the same training loop on two ranks, logging and printing every step, against torchrun."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from tests.bench import launch
from tests.bench.measured import Row
from tests.bench.shell import Shell, product
from tests.bench.start import fresh

ROUNDS = 5
WARM_UP = 8
BODY = launch.BODIES / "train.py"


def measure(folder: Path) -> list[Row]:
    """Rounds of both in turn; the first steps of each are left out, and both must end with the same loss."""
    ours: list[float] = []
    theirs: list[float] = []
    with product(folder / "ours") as shell:
        shell.run("%load_ext jupyter_llmcloud")
        for number in range(ROUNDS):
            with fresh(folder / f"ours-{number}") as place:
                speed, loss = _ours(shell, place)
            with fresh(folder / f"peer-{number}") as place:
                peer_speed, peer_loss = _torchrun(place)
            if abs(loss - peer_loss) > 1e-4:
                raise AssertionError(f"the loss is {loss}, under torchrun {peer_loss}: not the same training")
            ours.append(speed)
            theirs.append(peer_speed)
    what = "training throughput, 3.9 M parameters, 2 ranks"
    return [Row("throughput", what, "tokens/s", "torchrun", ours, theirs, goal=1.0, at_least=True)]


def _ours(shell: Shell, place: Path) -> tuple[float, float]:
    shell.run(f"BENCH_FOLDER = {str(place)!r}")
    shell.run(f"%%distribute -n 2 --name throughput --push BENCH_FOLDER\n{BODY.read_text()}")
    return _speed(place)


def _torchrun(place: Path) -> tuple[float, float]:
    with launch.started("torchrun", BODY, 2, place):
        pass
    return _speed(place)


def _speed(place: Path) -> tuple[float, float]:
    report = json.loads((place / "report.json").read_text())
    return report["tokens_per_step"] / median(report["seconds"][WARM_UP:]), report["loss"]
