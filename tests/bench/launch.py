"""Starting the peers as a user does, meeting their ranks, and measuring what these hold in memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.bench.shell import REPOSITORY

BODIES = Path(__file__).parent / "bodies"
DEADLINE_S = 180.0
# What makes Accelerate distributed on a CPU, with as many threads per rank as ours get.
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_NOTEBOOK = """\
import runpy, sys
from accelerate import notebook_launcher
def train():
    runpy.run_path(sys.argv[1])
notebook_launcher(train, num_processes=int(sys.argv[2]), use_port=sys.argv[3])
"""


def command(peer: str, body: Path, num_ranks: int) -> list[str]:
    """What a user types for `peer`."""
    scripts, port = Path(sys.executable).parent, str(free_port())
    match peer:
        case "torchrun":
            return [f"{scripts}/torchrun", "--nproc_per_node", str(num_ranks), "--master_port", port, str(body)]
        case "accelerate launch":
            # --cpu --num_processes 2 would start one process only: more of them want mpirun.
            flags = ["--multi_gpu", "--num_processes", str(num_ranks), "--num_machines", "1", "--mixed_precision", "no"]
            return [
                f"{scripts}/accelerate",
                "launch",
                *flags,
                "--dynamo_backend",
                "no",
                "--main_process_port",
                port,
                str(body),
            ]
        case "notebook_launcher":
            return [sys.executable, "-c", _NOTEBOOK, str(body), str(num_ranks), port]
    raise ValueError(f"unknown peer {peer!r}")


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    # The launchers want a number; that another takes it in between is their users' risk too.
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def started(peer: str, body: Path, num_ranks: int, folder: Path) -> Iterator[float]:
    """Run a body under a peer's launcher; yields the time of the start and ends whatever is left."""
    env = {**os.environ, **CPU, "BENCH_FOLDER": str(folder), "BENCH_FAMILY": str(folder), "PYTHONPATH": str(REPOSITORY)}
    log = folder / "log.txt"
    with log.open("w") as output:
        began = time.time()
        process = subprocess.Popen(
            [*command(peer, body, num_ranks), str(folder)],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield began
            (folder / "go").touch()
            if status := process.wait(DEADLINE_S):
                raise RuntimeError(f"{peer} ended with {status}:\n{log.read_text()[-2000:]}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def meet(folder: Path, num_ranks: int) -> list[dict[str, float]]:
    """Wait until every rank has told that its first collective is finished: [{"pid", "finished"}]."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        told = sorted(folder.glob("rank-*.json"))
        if len(told) == num_ranks:
            return [json.loads(path.read_text()) for path in told]
        time.sleep(0.02)
    log = folder / "log.txt"
    said = log.read_text()[-2000:] if log.exists() else ""
    raise TimeoutError(
        f"only {len(told)} of {num_ranks} ranks came to their first collective in {DEADLINE_S} s.\n{said}"
    )


def pss_mib(pids: set[int]) -> float:
    """Memory of these processes, shared pages counted once in all."""
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def with_zygote(rank_pids: set[int]) -> set[int]:
    """The ranks, the zygote they were forked from, and whatever else it forked."""
    zygotes = {psutil.Process(pid).ppid() for pid in rank_pids}
    forked = {child.pid for pid in zygotes for child in psutil.Process(pid).children(recursive=True)}
    return rank_pids | zygotes | forked
