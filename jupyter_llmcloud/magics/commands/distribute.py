"""%%distribute, %push, %pull."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from jupyter_llmcloud.core.names import parse_duration, parse_variables
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.options import Option, Syntax, integer, parse, split
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import read_cell
from jupyter_llmcloud.magics.session.stop_signal import said_when_stopped


def _names(option: str) -> Any:
    return lambda text: parse_variables(text, option)


DISTRIBUTE = Syntax(
    "%%distribute",
    (
        Option(
            ("-n", "--nproc"),
            "Number of ranks, when the cell starts the world.",
            metavar="N",
            parse=integer(1),
        ),
        Option(("--ranks",), "Run on these ranks only, for example 0,2-3.", metavar="RANKS"),
        Option(("--name",), "Name of the run, by which it is shown, served and compared.", metavar="NAME"),
        Option(("--push",), "Variables to copy to every rank first.", metavar="a,b", parse=_names("--push")),
        Option(
            ("--pull",),
            "Variables to bring back from the first rank afterwards.",
            metavar="x,y",
            parse=_names("--pull"),
        ),
        Option(("-b", "--background"), "Return at once with a handle; the run goes on without the kernel."),
        Option(("--precision",), "Mixed precision of Accelerate.", values=("no", "bf16", "fp16", "fp8")),
        Option(
            ("--save",),
            "Variables to save with the run as a model: model, tokenizer.",
            metavar="model,tokenizer",
            parse=_names("--save"),
        ),
        Option(("--no-replay",), "Do not run this cell again on a rank that replaces a lost one."),
        Option(
            ("--timeout",),
            "Stop the run after this time: 90s, 30m, 2h.",
            metavar="TIME",
            parse=parse_duration,
        ),
        Option(
            ("--hang-after",),
            "Report a rank that others have waited for this long (10s), or longer where that is normal.",
            metavar="TIME",
            parse=parse_duration,
        ),
        Option(
            ("--checkpoint-every",),
            "Save a checkpoint of everything that is trained every N optimizer steps.",
            metavar="N",
            parse=integer(1),
        ),
        Option(
            ("--keep-checkpoints",),
            "Keep the last K checkpoints (2), besides the best by metric.",
            metavar="K",
            parse=integer(1),
        ),
        Option(
            ("--max-restarts",),
            "Execute the run again up to K times when a rank, an agent or a host is lost, from its newest checkpoint.",
            metavar="K",
            parse=integer(0),
        ),
        Option(
            ("--resume",),
            "Go on from the newest checkpoint of an earlier run of this cell, also on another number of ranks.",
            metavar="RUN",
        ),
        Option(("--seed",), "Seed Python, NumPy and torch alike on every rank.", metavar="N", parse=integer(0)),
    ),
    help="Run the cell on every rank of the world as if it ran in the notebook.",
)
PUSH = Syntax(
    "%push",
    (Option(("--ranks",), "Only to these ranks.", metavar="RANKS"),),
    "NAMES...",
    "Copy variables to every rank.",
)
PULL = Syntax("%pull", (), "NAMES...", "Bring variables back: x from rank 0, x@3 from rank 3, x@all as a list.")


@magics_class
class DistributeMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    shell: Any

    @cell_magic
    def distribute(self, line: str, cell: str) -> Any:
        """Run the cell on every rank of the world. `%%distribute?` lists the options."""
        given = parse(DISTRIBUTE, split(line, "%%distribute"))
        values = {
            **given.values,
            "push": given.push or [],
            "pull": given.pull or [],
            "save": given.save or [],
        }
        result = session.current().distribute(self.shell, read_cell(self.shell, line, cell), **values)
        return result if given.background else None

    @line_magic
    def push(self, line: str) -> None:
        """%push a,b [--ranks 0,2]: copy variables of the notebook to the ranks."""
        given = parse(PUSH, split(line, "%push"))
        push(parse_variables(",".join(given.arguments), "%push"), self.shell.user_ns, given.ranks)

    @line_magic
    def pull(self, line: str) -> None:
        """%pull x,y@3,z@all: bring variables of ranks back into the notebook."""
        given = parse(PULL, split(line, "%pull"))
        wanted = [part.strip() for part in ",".join(given.arguments).split(",") if part.strip()]
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
    chosen = parse_ranks(ranks, world.world_size) if ranks else ()
    with said_when_stopped("%push was stopped. Some ranks may have the variables already, others not."):
        world.push({name: namespace[name] for name in names}, chosen)


def pull(wanted: list[str]) -> dict[str, Any]:
    """`["x", "y@3", "z@all"]` -> their values by name."""
    world = _world()
    plan = [_place(text, world.world_size) for text in wanted]
    values: dict[str, Any] = {}
    with said_when_stopped("%pull was stopped. The notebook's variables are as they were."):
        for name, ranks, as_list in plan:
            found = [world.pull([name], rank)[name] for rank in ranks]
            values[name] = found if as_list else found[0]
    return values


def _place(text: str, world_size: int) -> tuple[str, list[int], bool]:
    name, at, where = text.partition("@")
    parse_variables(name, "%pull")
    if not at:
        return name, [0], False
    if where == "all":
        return name, list(range(world_size)), True
    if not where.isdigit() or int(where) >= world_size:
        raise UsageError(f"%pull {text}: after @ comes a rank from 0 to {world_size - 1}, or all.")
    return name, [int(where)], False
