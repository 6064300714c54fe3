"""Who holds the slots of a cluster: worlds by their names, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Self

from jupyter_llmcloud.errors import NotFound, UsageError

MAX_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class HeldWorld:
    """A world as its leading agent describes it.

    Attributes:
        owner: what it was started for: the path of a notebook, `pid:123`, `server:...`.
        run_id: the run that is executed there now.
        started: when, in seconds since the epoch.
        ends_in_s: when it ends unless somebody uses it; None while it is used.
    """

    world_id: str
    owner: str
    world_size: int
    run_id: str = ""
    started: float = 0.0
    ends_in_s: float | None = None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Self:
        """From a description, which may tell more."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    @property
    def holder(self) -> str:
        """Who has it, in words; no absolute path, since a notebook is shared."""
        return holder(self.owner)

    @property
    def state(self) -> str:
        """What it does now."""
        if self.run_id:
            return f"executes {self.run_id}"
        return "idle" if self.ends_in_s is None else f"unused, ends in {self.ends_in_s:.0f} s"


def sweep_of(owner: str) -> str:
    """The sweep of which this is a trial; "" for none."""
    kind, _, rest = owner.partition(":")
    return rest if kind == "sweep" else ""


def holder(owner: str) -> str:
    """`/home/me/project/a.ipynb` -> `project/a.ipynb`; processes and servers in words."""
    kind, _, rest = owner.partition(":")
    if kind == "pid" and rest.isdigit():
        return f"process {rest}"
    if kind == "server":
        return "a run without a notebook"
    if sweep := sweep_of(owner):
        return f"the sweep {sweep}"
    return "/".join(PurePath(owner).parts[-2:]).removeprefix("//") or "somebody"


def find_world(worlds: Sequence[HeldWorld], name: str) -> HeldWorld:
    """The world of this id or the beginning of one, or of this notebook, by as much of its path as tells it apart.

    Raises NotFound, and UsageError when several are meant.
    """
    wanted = PurePath(name).parts
    found = [
        world
        for world in worlds
        if world.world_id.startswith(name)
        or world.holder == name
        or (wanted and PurePath(world.owner).parts[-len(wanted) :] == wanted)
    ]
    exact = [world for world in found if world.world_id == name] or found
    if len(exact) == 1:
        return exact[0]
    if exact:
        raise UsageError(f"{name!r} names {len(exact)} worlds: {list_worlds(exact)}. Give the id of one of them.")
    there_are = f"There are: {list_worlds(worlds)}." if worlds else "There are none."
    raise NotFound(f"there is no world {name!r}. {there_are}")


def list_worlds(worlds: Iterable[HeldWorld]) -> str:
    """`2 ranks of project/a.ipynb (world 3f...)`, one after the other. Nothing in it changes with time."""
    rows = sorted(worlds, key=lambda world: (-world.world_size, world.world_id))
    named = [
        f"{world.world_size} rank{'s' if world.world_size != 1 else ''} of {world.holder} (world {world.world_id})"
        for world in rows[:MAX_NAMED]
    ]
    more = len(rows) - len(named)
    return ", ".join(named) + (f" and {more} worlds more" if more > 0 else "")
