"""What is known of a living cluster: `<runtime>/c/<id>/cluster.json`, 0600 since it holds the TLS key."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.system.atomic_files import write_json
from jupyter_llmcloud.system.processes import is_process


@dataclass
class ClusterRecord:
    """One cluster. `pid` is its host process (0 when it was only connected to)."""

    cluster_id: str
    name: str
    kind: str
    address: str = ""
    dashboard: str = ""
    num_workers: int = 0
    num_slots: int = 0
    state: str = "starting"  # starting, running, stopping, failed
    reason: str = ""
    created: float = 0.0
    pid: int = 0
    pid_started: float = 0.0
    owner_pid: int = 0
    owner_started: float = 0.0
    workers: int | None = None  # as asked for
    options: dict[str, Any] = field(default_factory=dict)
    tls: dict[str, str] = field(default_factory=dict, repr=False)

    def public(self) -> dict[str, Any]:
        """Without what only a client of Dask may know."""
        hidden = ("tls", "pid_started", "cluster_id", "owner_pid", "owner_started", "workers", "options")
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    @property
    def folder(self) -> Path:
        """Where its processes keep sockets and logs."""
        return cluster_folder(self.cluster_id)

    @property
    def control(self) -> str:
        """The socket of its host process."""
        return str(self.folder / "control.sock")

    def save(self) -> None:
        """Write it, closed to others from the first byte."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not durable: it tells of processes of this host as it runs now.
        write_json(self.folder / "cluster.json", asdict(self), durable=False)

    def forget(self) -> None:
        """The cluster has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_alive(self) -> bool:
        """Whether its host process lives (a connected cluster: unknown, so yes)."""
        return self.pid == 0 or is_process(self.pid, self.pid_started)

    @property
    def has_owner(self) -> bool:
        """Whether the process it belongs to lives."""
        return bool(self.owner_pid) and is_process(self.owner_pid, self.owner_started)

    @property
    def has_agents(self) -> bool:
        """Whether a node agent of it lives on this host."""
        for path in self.folder.glob("a*/agent.json"):
            try:
                known = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if is_process(known["pid"], known["started"]):
                return True
        return False


def cluster_folder(cluster_id: str) -> Path:
    """Short, since sockets live below it."""
    return config.runtime_dir() / "c" / cluster_id


def read_record(folder: Path) -> ClusterRecord | None:
    """The record in a folder, if there is one."""
    try:
        data = json.loads((folder / "cluster.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return ClusterRecord(**{key: value for key, value in data.items() if key in ClusterRecord.__dataclass_fields__})


def saved_records() -> list[ClusterRecord]:
    """Every cluster that has a folder here."""
    parent = config.runtime_dir() / "c"
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [record for folder in folders if (record := read_record(folder)) is not None]
