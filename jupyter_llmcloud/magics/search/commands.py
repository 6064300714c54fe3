"""%%sweep, %sweeps, %lr_find, %batch_find."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from jupyter_llmcloud.core.options import Option, Syntax, integer, parse, split, take_verb
from jupyter_llmcloud.core.search.spec import SWEEP
from jupyter_llmcloud.magics.commands.tables import Table, ago, span
from jupyter_llmcloud.magics.search import finders, sweeps
from jupyter_llmcloud.magics.search.view import best_line
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import read_cell

VERBS = {
    "list": Syntax("%sweeps list", (), "", "A table of sweeps."),
    "show": Syntax("%sweeps show", (), "NAME", "All trials of a sweep.", names="sweeps"),
    "attach": Syntax("%sweeps attach", (), "NAME", "Show a sweep in this cell and follow it.", names="sweeps"),
    "resume": Syntax(
        "%sweeps resume",
        (Option(("--trials",), "Trials in all.", metavar="N", parse=integer(1)),),
        "NAME",
        "Go on with a sweep that was stopped or interrupted, or have more trials.",
        names="sweeps",
    ),
    "stop": Syntax("%sweeps stop", (), "NAME", "Stop a sweep; what is done is kept.", names="sweeps"),
    "delete": Syntax("%sweeps delete", (), "NAME", "Remove a sweep that has ended; its runs stay.", names="sweeps"),
}


def get(name: str) -> sweeps.SweepHandle:
    """The sweep of this name. Raises NotFound."""
    handle = sweeps.SweepHandle(name)
    handle.info()
    return handle


def table() -> Table:
    """Sweeps, the newest first."""
    rows = []
    for told in session.current().server.sweeps():
        took = span(told["ended"] - told["created"]) if told["ended"] else ""
        rows.append(
            (
                told["name"],
                told["state"],
                ago(told["created"]),
                took,
                told["num_trials"],
                best_line(told) or told["reason"],
            )
        )
    return Table(["sweep", "state", "began", "took", "trials", "best so far"], rows, "There are no sweeps yet.")


def show(name: str) -> Table:
    """All trials of a sweep, the best first."""
    return get(name).table()


def stop(name: str) -> str:
    """Stop a sweep; returns its state."""
    return get(name).stop()


def delete(name: str) -> None:
    """Remove a sweep that has ended; its runs stay."""
    session.current().server.delete_sweep(name)


@magics_class
class SweepMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    shell: Any

    @cell_magic
    def sweep(self, line: str, cell: str) -> Any:
        """Run the cell as many trials, each on ranks of its own. `%%sweep?` lists the options."""
        parsed = parse(SWEEP, split(line, "%%sweep"))
        handle = sweeps.start(self.shell, read_cell(self.shell, line, cell, "%%sweep"), parsed.given)
        return handle if parsed.background else None

    @line_magic
    def sweeps(self, line: str) -> Any:
        """%sweeps [list|show|attach|resume|stop|delete] NAME: searches of hyperparameters."""
        words = split(line, "%sweeps")
        verb = take_verb("%sweeps", VERBS, words, "list")
        parsed = parse(VERBS[verb], words)
        name = parsed.arguments[0] if parsed.arguments else ""
        match verb:
            case "list":
                return table()
            case "show":
                return show(name)
            case "attach":
                get(name).attach()
            case "resume":
                get(name).resume(parsed.trials)
            case "stop":
                print(f"{name}: {stop(name)}")
            case _:
                delete(name)
        return None

    @line_magic
    def lr_find(self, line: str) -> Any:
        """%lr_find MODEL OPTIMIZER LOADER: a learning rate, by a range test on the ranks."""
        parsed = parse(finders.LR_FIND, split(line, "%lr_find"))
        model, optimizer, loader = parsed.arguments
        return finders.lr_find(self.shell, model, optimizer, loader, **parsed.given)

    @line_magic
    def batch_find(self, line: str) -> Any:
        """%batch_find MODEL OPTIMIZER LOADER: a batch size, by steps of growing batches on the ranks."""
        parsed = parse(finders.BATCH_FIND, split(line, "%batch_find"))
        model, optimizer, loader = parsed.arguments
        return finders.batch_find(self.shell, model, optimizer, loader, **parsed.given)
