"""%world: the ranks of this notebook."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.core.options import Syntax, integer, parse, read_argument, split, take_verb
from jupyter_llmcloud.core.run.time_split import in_words
from jupyter_llmcloud.core.spec import WorldSpec
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.magics.commands.tables import PanelOf, Table, ago
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.storage.runs import RunStore

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
    "list": Syntax("%world list", (), "", "The worlds of all notebooks: who has them, what they do."),
    "stop": Syntax(
        "%world stop",
        (),
        "[WORLD]",
        "End the ranks of this notebook, or a world by its id or its notebook; their variables are gone.",
        names="worlds",
    ),
}


def status() -> Table:
    """A row per rank."""
    world = session.current().attach_world()
    if world is None:
        return Table([], [], "This notebook has no world yet: the first %%distribute cell starts one, or %world start.")
    description = world.describe()
    shares = RunStore().folder(description.run_id).read_times()[0] if description.run_id else {}
    rows = [
        (
            row["rank"],
            row["state"],
            row["pid"],
            row["host"],
            f"{row['rss'] / 2**20:.0f} MiB" if "rss" in row else "",
            in_words(shares.get(row["rank"], {})),
        )
        for row in description.ranks
    ]
    table = Table(["rank", "state", "pid", "host", "memory", "time goes into"], rows, "")
    return table.shown_by(PanelOf("world", world.world_id))


def start(nproc: int | None = None, cluster: str | None = None, priority: int = 0) -> Table:
    """Start the ranks of this notebook."""
    session.current().start_world(nproc, cluster, priority=priority)
    return status()


def restart(nproc: int | None = None, cluster: str | None = None, priority: int = 0) -> Table:
    """End the ranks and start new ones, as many as before when `nproc` is None."""
    session.current().restart_world(nproc, cluster, priority)
    return status()


def resize(num_ranks: int) -> Table:
    """Have this many ranks: the highest end, or new ones start; those that stay keep their variables."""
    current = session.current()
    world = current.attach_world()
    if world is None:
        raise NotFound("this notebook has no world to resize: %world start.")
    more = num_ranks - world.world_size
    for note in world.resize(num_ranks, current.server.place(world.cluster, more) if more > 0 else None):
        print(note, flush=True)
    return status()


class StacksText(list[str]):
    """Lines that IPython shows as they are."""

    def __repr__(self) -> str:
        return "\n".join(self)


def stacks() -> StacksText:
    """What every rank is doing now, at which notebook line; works while a run goes on."""
    world = session.current().attach_world()
    if world is None:
        raise NotFound("this notebook has no world: %world start.")
    return StacksText(world.stacks())


def local_variables() -> Table:
    """The local variables of the notebook line at which the last cell failed, on the rank that failed first."""
    world = session.current().attach_world()
    error = world.last_error if world is not None else None
    if error is None:
        return Table([], [], "No cell of this world has failed since the kernel started.")
    heading = f"value at {error.place or 'an unknown line'} on rank {error.rank}"
    return Table(["name", heading], [*error.locals.items()], "The failed line has no variables of its own.")


def listing() -> Table:
    """A row per world of the server's clusters, whoever has it."""
    current = session.current()
    world = current.attach_world()
    own = world.world_id if world is not None else ""
    rows = [
        (
            row["world_id"],
            "this notebook" if row["world_id"] == own else row["holder"],
            row["cluster"],
            row["num_ranks"],
            row["state"],
            ago(row["started"]),
        )
        for row in current.server.worlds()
    ]
    table = Table(["world", "holder", "cluster", "ranks", "state", "started"], rows, "There are no worlds.")
    return table.shown_by(PanelOf("world"))


def stop(name: str | None = None) -> None:
    """End the ranks of this notebook, or the world of this id or notebook, whoever has it; says what was ended."""
    current = session.current()
    world = current.attach_world()
    if name is None or (world is not None and world.world_id == name):
        current.stop_world()
        return
    ended = current.server.stop_world(name)
    if world is not None and ended["world_id"] == world.world_id:
        current.lose_world()
    run = f" The run {ended['run_id']} was stopped." if ended["run_id"] else ""
    print(
        f"Ended the world {ended['world_id']} of {ended['holder']}: its {ended['num_ranks']} ranks and their variables "
        f"are gone.{run}"
    )


def list() -> Table:
    """The same as `listing`, for `lc.world.list()`."""
    return listing()


@magics_class
class WorldMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def world(self, line: str) -> Any:
        """%world [status | start | restart | resize N | list | stacks | locals | stop [WORLD]]: ranks of notebooks."""
        words = split(line, "%world")
        verb = take_verb("%world", VERBS, words, "status")
        given = parse(VERBS[verb], words)
        if verb == "resize":
            return resize(read_argument(VERBS["resize"], given.arguments[0], integer(1)))
        if verb == "stop":
            return stop(given.arguments[0] if given.arguments else None)
        calls = {"status": status, "start": start, "restart": restart, "list": listing}
        return {**calls, "stacks": stacks, "locals": local_variables}[verb](**given.values)
