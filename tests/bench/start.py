"""From asking for a world to its first collective, everything imported; and the memory the world then holds.

A peer starts from nothing: a process or, for those that live in one, a notebook that has loaded nothing of it; its
imports, its process group. Ours is measured twice: from nothing (a fresh IPython with no server, cluster or zygote
anywhere) and warm (the second world of a notebook). Memory is that of the ranks, with our zygote; what a peer keeps
running beside its ranks (controllers, schedulers, agents) is not counted for anybody.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.bench import launch
from tests.bench.measured import Row
from tests.bench.notebooks import IPYPARALLEL, NBDISTRIBUTED, NotebookPeer
from tests.bench.peers import PeerMissing
from tests.bench.shell import Shell, product

ROUNDS = 3
LAUNCHERS = ("accelerate launch", "torchrun", "notebook_launcher")
NOTEBOOKS = {peer.name: peer for peer in (IPYPARALLEL, NBDISTRIBUTED)}
PEERS = (*LAUNCHERS, *NOTEBOOKS)
MEMORY_PEERS = {"torchrun": 0.65, IPYPARALLEL.name: None}
BODY = launch.BODIES / "first_collective.py"
Sample = tuple[float, float]  # seconds to the first collective, MiB


def measure(folder: Path) -> list[Row]:
    """Rounds of every contender in turn on two ranks, then one round on eight for the memory."""
    samples: dict[str, list[Sample]] = {name: [] for name in ("cold", "warm", *PEERS)}
    missing: dict[str, str] = {}
    for number in range(ROUNDS):
        with fresh(folder / f"ours-{number}") as place, product(place) as shell:
            samples["cold"].append(first_world(shell, place, 2, with_load=True))
            shell.run("%world stop")
            samples["warm"].append(first_world(shell, place, 2))
        for peer in PEERS:
            with fresh(folder / f"peer-{number}") as place:
                try:
                    samples[peer].append(_peer(peer, place))
                except PeerMissing as reason:
                    missing[peer] = str(reason)
    memory = [_memory_row(2, samples["warm"], peer, samples[peer], goal) for peer, goal in MEMORY_PEERS.items()]
    return [*_start_rows(samples, missing), *memory, _eight(folder)]


def _start_rows(samples: dict[str, list[Sample]], missing: dict[str, str]) -> list[Row]:
    goals = {("warm", "accelerate launch"): 0.015, ("cold", "accelerate launch"): 0.8}
    titles = {
        "warm": "start to first collective, warm, 2 ranks",
        "cold": "start to first collective, from nothing, 2 ranks",
    }
    return [
        Row(
            "start",
            title,
            "s",
            peer,
            _first(samples[ours]),
            _first(samples[peer]),
            goals.get((ours, peer)),
            missing=missing.get(peer, ""),
        )
        for ours, title in titles.items()
        for peer in PEERS
    ]


def _eight(folder: Path) -> Row:
    with fresh(folder / "ours-8") as place, product(place) as shell:
        ours = [first_world(shell, place, 8, with_load=True)]
    with fresh(folder / "peer-8") as place:
        return _memory_row(8, ours, "torchrun", [_launcher("torchrun", place, 8)], 0.25)


def _memory_row(num_ranks: int, ours: list[Sample], peer: str, theirs: list[Sample], goal: float | None) -> Row:
    what = f"memory at the first collective (PSS, zygote included), {num_ranks} ranks"
    return Row("start", what, "MiB", peer, [mib for _, mib in ours], [mib for _, mib in theirs], goal)


def _first(samples: list[Sample]) -> list[float]:
    return [seconds for seconds, _ in samples]


def first_world(shell: Shell, place: Path, num_ranks: int, with_load: bool = False) -> Sample:
    """A world of ours: from the cell's start to the last rank's first collective, and its memory with the zygote.

    `with_load` counts from the start of `%load_ext`, which the first world of a notebook must wait for.
    """
    with _meeting(place) as folder:
        shell.begin(f"%load_ext jupyter_llmcloud\nBENCH_FOLDER = {str(folder)!r}")
        loaded, _ = shell.finish()
        shell.begin(f"%%distribute -n {num_ranks} --push BENCH_FOLDER\n{BODY.read_text()}")
        ranks = launch.meet(folder, num_ranks)
        memory = launch.pss_mib(launch.with_zygote({int(rank["pid"]) for rank in ranks}))
        (folder / "go").touch()
        began, _ = shell.finish()
    return max(rank["finished"] for rank in ranks) - (loaded if with_load else began), memory


def _peer(peer: str, place: Path) -> Sample:
    if peer in NOTEBOOKS:
        return _notebook(NOTEBOOKS[peer], place)
    return _launcher(peer, place, 2)


def _launcher(peer: str, place: Path, num_ranks: int) -> Sample:
    with _meeting(place) as folder, launch.started(peer, BODY, num_ranks, folder) as began:
        return _met(folder, num_ranks, began)


def _notebook(peer: NotebookPeer, place: Path) -> Sample:
    with peer.shell(place) as shell, _meeting(place) as folder:
        began = peer.begin(shell)
        shell.begin(peer.cell(f"BENCH_FOLDER = {str(folder)!r}\n{BODY.read_text()}"))
        sample = _met(folder, 2, began)
        (folder / "go").touch()
        shell.finish()
    return sample


def _met(folder: Path, num_ranks: int, began: float) -> Sample:
    ranks = launch.meet(folder, num_ranks)
    memory = launch.pss_mib({int(rank["pid"]) for rank in ranks})
    return max(rank["finished"] for rank in ranks) - began, memory


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty folder that goes again."""
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _meeting(place: Path) -> Iterator[Path]:
    with fresh(place / "meeting") as folder:
        yield folder
