"""A Slurm of one node on this machine, with a configuration, keys and ports of its own: munged, slurmctld and slurmd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.worlds import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo")
CONFIGURATION = """\
ClusterName=llmcloud
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
FirstJobId={controller_port}
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# As most sites have it: what a job has started is a control group, all of which is killed when its script ends.
CONTROL_GROUPS = Path("/sys/fs/cgroup")
CONTROL_GROUP_CONFIGURATION = f"CgroupAutomount=no\nCgroupPlugin=cgroup/v1\nCgroupMountpoint={CONTROL_GROUPS}\n"


@dataclass
class Slurm:
    """It runs; `SLURM_CONF` names it to the programs of Slurm."""

    folder: Path

    def ask(self, *words: str) -> str:
        """What a program of Slurm prints."""
        environ = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, env=environ)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """The states of its jobs by their numbers."""
        rows = self.ask("squeue", "--all", "--states=all", "--noheader", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows)

    def running(self) -> set[str]:
        """The numbers of those that run."""
        return {number for number, state in self.states().items() if state == "RUNNING"}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _start(folder: Path, *words: str) -> None:
    """Start a daemon, which leaves its number in a file."""
    environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / f"{words[0]}.out").open("ab") as out:
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=60, check=True, env=environ)


def _end(pid_file: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
        daemon = psutil.Process(int(pid_file.read_text()))
        daemon.send_signal(signal.SIGTERM)
        with contextlib.suppress(psutil.TimeoutExpired):
            daemon.wait(20)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start it below a short folder; skips the test, saying why, where it cannot be started."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"NOT TESTED: a real Slurm; there is no {missing[0]} (Debian: slurmctld slurmd slurm-client munge)")
    if os.getuid():
        pytest.skip("NOT TESTED: a real Slurm; starting slurmd takes root")
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    munge = folder / "munge"
    munge.chmod(0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    has_groups = os.access(CONTROL_GROUPS / "freezer", os.W_OK)
    values = {
        "tracking": "cgroup" if has_groups else "linuxproc",
        "host": socket.gethostname().split(".")[0], "folder": folder,
        "controller_port": _free_port(), "node_port": _free_port(),
    }  # fmt: skip
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
    (folder / "cgroup.conf").write_text(CONTROL_GROUP_CONFIGURATION if has_groups else "CgroupAutomount=no\n")
    running = Slurm(folder)
    try:
        _start(
            folder, "munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        _start(folder, "slurmctld", "-i")
        _start(folder, "slurmd")
        until(lambda: "idle" in running.ask("sinfo", "--noheader", "--format=%T"), "the node of Slurm is idle", 60)
        yield running
    finally:
        with contextlib.suppress(OSError):
            for number, state in running.states().items():
                if state in {"RUNNING", "PENDING"}:
                    running.ask("scancel", number)
            until(lambda: not running.ask("squeue", "--noheader"), "no job runs any more", 60)
        for name in ("slurmd", "slurmctld", "munged"):
            _end(folder / f"{name}.pid")
