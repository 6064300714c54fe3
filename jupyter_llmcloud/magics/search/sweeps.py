"""Sweeps as a notebook has them: started from a cell, followed until they end, looked at later."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.client.stop_signal import StopSignal, said
from jupyter_llmcloud.core.export.literals import literal
from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import SweepFailed, UsageError
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.search.view import SweepView, lines_of, trial_table
from jupyter_llmcloud.magics.session import cell as cells
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell
from jupyter_llmcloud.magics.session.kernel_end import kernel_end
from jupyter_llmcloud.magics.session.run_handle import RunHandle

WAIT_S = 0.5  # a Stop is passed on after no longer than that


class SweepHandle:
    """A sweep: its state, its trials, the best of them.

    Attributes:
        name: of the sweep.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def _server(self) -> ServerClient:
        return session.current().server

    def info(self) -> dict[str, Any]:
        """All that is known of it, as REST answers."""
        return self._server.sweep(self.name)

    @property
    def state(self) -> str:
        """running, finished, failed, stopped, interrupted."""
        return str(self.info()["state"])

    @property
    def trials(self) -> list[dict[str, Any]]:
        """A dict for each trial: number, state, value, step, params, run_id, reason, ..."""
        return list(self.info()["trials"])

    @property
    def best(self) -> dict[str, Any]:
        """The best of the trials that are done. Raises UsageError when there is none."""
        found = self.info()["best"]
        if found is None:
            raise UsageError(f"no trial of the sweep {self.name!r} is done yet.")
        return dict(found)

    @property
    def best_run(self) -> RunHandle:
        """The run of the best trial, which `lc.serve` takes; `%serve` takes its id."""
        return RunHandle(self.best["run_id"], lambda: self._server)

    @property
    def importance(self) -> dict[str, float]:
        """Of each parameter, once it has ended."""
        return dict(self.info()["importance"])

    def study(self) -> Any:
        """Optuna's own study, with all that it can do."""
        from jupyter_llmcloud.storage.search.study import open_storage, optuna, storage_place
        from jupyter_llmcloud.storage.search.sweeps import SweepStore

        folder = SweepStore().find(self.name)
        place = storage_place(folder.read().spec.get("storage"), folder.journal)
        return optuna().load_study(study_name=self.name, storage=open_storage(place))

    def attach(self) -> SweepHandle:
        """Show it in this cell and follow it until it ends; Stop stops it."""
        return follow(self.name)

    def stop(self) -> str:
        """Stop it; what is done is kept. Returns the state."""
        return str(self._server.stop_sweep(self.name)["state"])

    def resume(self, trials: int | None = None) -> SweepHandle:
        """Go on with the cell that it has; with more trials if told so."""
        more = {} if trials is None else {"trials": trials}
        self._server.start_sweep(name=self.name, resume=True, **more)
        return follow(self.name)

    def table(self) -> Table:
        """Its trials, the best first."""
        return trial_table(self.info())

    def __repr__(self) -> str:
        told = self.info()
        ending = told["reason"] if told["state"] == "failed" else ""  # which else is among the lines
        return "\n".join(filter(None, [*lines_of(told), ending]))


def start(shell: Any, cell: Cell, given: Mapping[str, Any]) -> SweepHandle:
    """Run a cell as a sweep; `given` are options of SweepSpec. Follows it, unless it is to go on by itself."""
    from jupyter_llmcloud.magics.session.session import pushed_values

    spec = SweepSpec.make(given, Interface.NOTEBOOK)
    cells.check_syntax(shell, cell)
    pushed = pushed_values(shell.user_ns, spec.push or ())
    texts = {name: literal(shell.user_ns[name]) for name in spec.push or ()}
    own = ("push", "background")
    # Also what is a default: of a sweep that goes on it may be a change.
    body = {key: getattr(spec, key) for key, value in given.items() if key not in own and value is not None}
    if pushed:
        body["pushed"] = base64.b64encode(pushed).decode()
    here = session.current()
    if spec.cluster is None and here.cluster is not None:
        body["cluster"] = here.cluster
    told = here.server.start_sweep(source=cell.source, cell=_as_body(cell, texts), **body)
    handle = SweepHandle(told["name"])
    if spec.background:
        print(f"The sweep {handle.name} goes on by itself: %sweeps attach {handle.name} shows it.")
        return handle
    return follow(handle.name)


def _as_body(cell: Cell, pushed: dict[str, str]) -> dict[str, Any]:
    from jupyter_llmcloud.magics.session.world_client import working_folder

    return {
        "code": cell.code,
        "filename": cell.filename,
        "line_offset": cell.line_offset,
        "execution_count": cell.number,
        "folder": working_folder(),
        "pushed": pushed,
    }


def follow(name: str) -> SweepHandle:
    """Show a sweep until it has ended; Stop stops it, a second one harder."""
    server, view = session.current().server, SweepView()
    told = server.sweep(name)
    view.show(told)
    with StopSignal(kernel_end.explains_press) as stop:
        while told["state"] == "running" and not stop.is_leaving:
            if stop.presses > stop.passed_on:
                stop.drain()
                stop.passed_on += 1
                _stop(server, name)
                view.stopping()
            told = server.sweep(name, told["version"], WAIT_S)
            view.show(told)
    if stop.is_leaving:
        message = f"{kernel_end.message} The sweep goes on: %sweeps attach {name} shows it."
        raise said(message) from None
    view.end(told)
    if told["state"] == "failed":
        raise SweepFailed(f"the sweep {name!r} has failed: {told['reason']}")
    if stop.presses:
        text = f"the sweep {name} had ended when Stop came."
        if told["state"] == "stopped":
            text = f"the sweep {name} was stopped; what is done is kept: %sweeps resume {name} goes on."
        raise said(text, f"KeyboardInterrupt: {text}")
    return SweepHandle(name)


def _stop(server: ServerClient, name: str) -> None:
    try:
        server.stop_sweep(name)
    except UsageError:
        pass  # it has ended meanwhile
