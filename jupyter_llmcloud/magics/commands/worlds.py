"""%world: the ranks of this notebook."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.core.options import Syntax, integer, parse, split
from jupyter_llmcloud.core.spec import WorldSpec
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.session import session

VERBS = {
    "status": Syntax("%world status", (), "", "Pid, host, memory and state of each rank."),
    "start": Syntax("%world start", WorldSpec.options(), "", "Start the ranks."),
    "restart": Syntax(
        "%world restart", WorldSpec.options(), "", "End the ranks and start new ones; their variables are gone."
    ),
    "resize": Syntax(
        "%world resize", (), "N", "Have N ranks; those that stay keep their variables, models must be prepared again."
    ),
    "stacks": Syntax(
        "%world stacks", (), "", "What every rank is doing now, also while a run goes on; what is equal is said once."
    ),
    "locals": Syntax("%world locals", (), "", "The local variables of the line at which the last cell failed."),
    "stop": Syntax("%world stop", (), "", "End the ranks; their variables are gone."),
}


def status() -> Table:
    """A row per rank."""
    world = session.current().attach_world()
    if world is None:
        return Table([], [], "This notebook has no world yet: the first %%distribute cell starts one, or %world start.")
    description = world.describe()
    rows = [
        (
            row["rank"],
            row["state"],
            row["pid"],
            row["host"],
            f"{row['rss'] / 2**20:.0f} MiB" if "rss" in row else "",
        )
        for row in description.ranks
    ]
    return Table(["rank", "state", "pid", "host", "memory"], rows, "")


def start(nproc: int | None = None, cluster: str | None = None) -> Table:
    """Start the ranks of this notebook."""
    session.current().start_world(nproc, cluster)
    return status()


def restart(nproc: int | None = None, cluster: str | None = None) -> Table:
    """End the ranks and start new ones, as many as before when `nproc` is None."""
    current = session.current()
    if current.attach_world() is None or current.world is None:
        raise NotFound("this notebook has no world to restart: %world start.")
    size, where = current.world.world_size, current.world.cluster
    current.stop_world()
    current.start_world(nproc or size, cluster or where)
    return status()


def resize(num_ranks: int) -> Table:
    """Have this many ranks: the highest end, or new ones start; those that stay keep their variables."""
    current = session.current()
    world = current.attach_world()
    if world is None:
        raise NotFound("this notebook has no world to resize: %world start.")
    more = num_ranks - world.world_size
    world.resize(num_ranks, current.server.place(world.cluster, more) if more > 0 else None)
    return status()


class Stacks(list[str]):
    """Lines that IPython shows as they are."""

    def __repr__(self) -> str:
        return "\n".join(self)


def stacks() -> Stacks:
    """What every rank is doing now, at which notebook line; works while a run goes on."""
    world = session.current().attach_world()
    if world is None:
        raise NotFound("this notebook has no world: %world start.")
    return Stacks(world.stacks())


def local_variables() -> Table:
    """The local variables of the notebook line at which the last cell failed, on the rank that failed first."""
    world = session.current().attach_world()
    error = world.last_error if world is not None else None
    if error is None:
        return Table([], [], "No cell of this world has failed since the kernel started.")
    heading = f"value at {error.place or 'an unknown line'} on rank {error.rank}"
    return Table(["name", heading], [*error.locals.items()], "The failed line has no variables of its own.")


def stop() -> None:
    """End the ranks of this notebook."""
    session.current().stop_world()


def _number_of_ranks(text: str) -> int:
    try:
        return integer(1)(text)
    except UsageError as error:
        raise UsageError(f"%world resize {text}: {error}.") from None


@magics_class
class WorldMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def world(self, line: str) -> Any:
        """%world [status | start -n N | restart | stacks | locals | stop]: the ranks of this notebook."""
        words = split(line, "%world")
        verb = words.pop(0) if words else "status"
        if verb not in VERBS:
            raise UsageError(f"%world {verb}: expected one of {', '.join(VERBS)}.")
        given = parse(VERBS[verb], words)
        if verb == "resize":
            return resize(_number_of_ranks(given.arguments[0]))
        calls = {"status": status, "start": start, "restart": restart, "stop": stop}
        return {**calls, "stacks": stacks, "locals": local_variables}[verb](**given.values)
