"""%%distribute, %push, %pull."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from jupyter_llmcloud.client.stop_signal import said_when_stopped
from jupyter_llmcloud.core.names import parse_variables
from jupyter_llmcloud.core.options import Option, Syntax, parse, split
from jupyter_llmcloud.core.spec import DISTRIBUTE
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import read_cell

PUSH = Syntax(
    "%push",
    (Option(("--ranks",), "Only to these ranks.", metavar="RANKS"),),
    "NAMES...",
    "Copy variables to every rank.",
    names="variables",
)
PULL = Syntax(
    "%pull",
    (),
    "NAMES...",
    "Bring variables back: x from rank 0, x@3 from rank 3, x@all as a list.",
    names="variables of ranks",
)


@magics_class
class DistributeMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    shell: Any

    @cell_magic
    def distribute(self, line: str, cell: str) -> Any:
        """Run the cell on every rank of the world. `%%distribute?` lists the options."""
        parsed = parse(DISTRIBUTE, split(line, "%%distribute"))
        result = session.current().distribute(self.shell, read_cell(self.shell, line, cell), parsed.given)
        return result if parsed.background else None

    @line_magic
    def push(self, line: str) -> None:
        """%push a,b [--ranks 0,2]: copy variables of the notebook to the ranks."""
        parsed = parse(PUSH, split(line, "%push"))
        push(parse_variables(",".join(parsed.arguments), "%push"), self.shell.user_ns, parsed.ranks)

    @line_magic
    def pull(self, line: str) -> None:
        """%pull x,y@3,z@all: bring variables of ranks back into the notebook."""
        parsed = parse(PULL, split(line, "%pull"))
        wanted = [part.strip() for part in ",".join(parsed.arguments).split(",") if part.strip()]
        self.shell.user_ns.update(pull(wanted))


def _world() -> Any:
    world = session.current().attach_world()
    if world is None:
        raise UsageError("this notebook has no world yet: the first %%distribute cell starts one, or %world start.")
    return world


def push(names: list[str], namespace: dict[str, Any], ranks: str | None = None) -> None:
    """Copy variables to ranks (all when None)."""
    from jupyter_llmcloud.core.names import parse_ranks

    missing = [name for name in names if name not in namespace]
    if missing:
        raise UsageError(f"%push {missing[0]}: there is no variable {missing[0]!r} in this notebook.")
    world = _world()
    chosen = parse_ranks(ranks, world.world_size) if ranks is not None else ()
    with said_when_stopped("%push was stopped. Some ranks may have the variables already, others not."):
        world.push({name: namespace[name] for name in names}, chosen)


def pull(wanted: list[str]) -> dict[str, Any]:
    """`["x", "y@3", "z@all"]` -> their values by name."""
    world = _world()
    plan = [_place(text, world.world_size) for text in wanted]
    _check_names([name for name, *_ in plan])
    values: dict[str, Any] = {}
    with said_when_stopped("%pull was stopped. The notebook's variables are as they were."):
        for name, ranks, as_list in plan:
            found = [world.pull([name], rank)[name] for rank in ranks]
            values[name] = found if as_list else found[0]
    return values


def _check_names(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"%pull: {twice!r} is named more than once, and the notebook has one variable of that name: "
            f"{twice}@all is a list of what all ranks have."
        )


def _place(text: str, world_size: int) -> tuple[str, list[int], bool]:
    name, at, where = text.partition("@")
    parse_variables(name, "%pull")
    if not at:
        return name, [0], False
    if where == "all":
        return name, list(range(world_size)), True
    if not where.isdecimal() or int(where) >= world_size:
        raise UsageError(f"%pull {text}: after @ comes a rank from 0 to {world_size - 1}, or all.")
    return name, [int(where)], False
