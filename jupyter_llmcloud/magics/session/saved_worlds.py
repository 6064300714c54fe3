"""Which world belongs to which notebook, so that a restarted kernel finds it again: `<runtime>/worlds/<hash>.json`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import ConnectionLost, NotFound
from jupyter_llmcloud.system.atomic_files import read_json, write_json
from jupyter_llmcloud.system.processes import is_process

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.session.leader_lookup import LeaderLookup
    from jupyter_llmcloud.magics.session.world_client import WorldClient


def _path(owner: str) -> Path:
    return config.runtime_dir() / "worlds" / f"{hashlib.sha256(owner.encode()).hexdigest()[:24]}.json"


def remember(owner: str, world: WorldClient) -> None:
    """The world belongs to this notebook."""
    path = _path(owner)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    about = {
        "address": world.address,
        "world_id": world.world_id,
        "cluster": world.cluster,
        "world_size": world.world_size,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    write_json(path, about, durable=False)  # of processes, which no loss of power outlives


def forget(owner: str) -> None:
    """This notebook has no world any more."""
    _path(owner).unlink(missing_ok=True)


def recall(owner: str, leaders: LeaderLookup) -> WorldClient | None:
    """The living world of this notebook, if there is one, also where a run has taken it along."""
    from jupyter_llmcloud.magics.session.world_client import WorldClient
    from jupyter_llmcloud.protocol.client import AgentChannel

    known = read_json(_path(owner))
    if known is None or _is_anothers(known):
        return None
    for address in (lambda: known["address"], lambda: leaders.of_world(known["world_id"])):
        try:
            channel = AgentChannel(address(), timeout_s=2)
            world = WorldClient(channel, known["world_id"], known["cluster"], known["world_size"], leaders)
            world.world_size = world.describe().world_size
        except (ConnectionLost, NotFound):
            continue
        return world
    forget(owner)
    return None


def _is_anothers(known: dict[str, Any]) -> bool:
    """Whether another kernel that lives has it: two may go by one name, such as two consoles of one folder."""
    if known.get("pid", os.getpid()) == os.getpid():
        return False
    return is_process(known["pid"], known.get("started", 0.0))
