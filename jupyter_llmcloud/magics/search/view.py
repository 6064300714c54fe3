"""How a sweep looks in a cell: a table that is replaced as it goes on, pictures in the end; all of it also as text."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_llmcloud.magics.commands.tables import Table, span
from jupyter_llmcloud.magics.search.pictures import importance_bars, parallel_coordinates

SHOWN = 15  # trials in the table of a cell
REDRAW_S = 0.25
REASON = 120  # characters
FAILED = ("failed", "unmeasured", "lost")


def number_text(value: Any) -> str:
    """A value of a parameter or a metric, short."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def params_text(params: Mapping[str, Any]) -> str:
    """`lr 0.001, layers 2`."""
    return ", ".join(f"{name} {'None' if value is None else number_text(value)}" for name, value in params.items())


def _ranked(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that run, then the best, then the others, the newest first."""
    sign = -1 if told["spec"].get("direction") == "maximize" else 1
    order = {"running": 0, "done": 1, "pruned": 2}

    def key(trial: Mapping[str, Any]) -> tuple[Any, ...]:
        value = trial["value"]
        is_ranked = trial["state"] == "done" and value is not None
        return (order.get(trial["state"], 3), sign * value if is_ranked else 0.0, -trial["number"])

    return sorted(told["trials"], key=key)


def _row(trial: Mapping[str, Any], of_population: bool) -> tuple[Any, ...]:
    took = span((trial["ended"] or time.time()) - trial["began"]) if trial["began"] else ""
    state = trial["state"] + (" (again)" if trial["num_attempts"] > 1 else "")
    params = params_text(trial["params"]) or _cut(trial["reason"])
    parent = trial.get("parent")
    turn = (trial.get("generation"), "" if parent is None else parent) if of_population else ()
    return (trial["number"], state, *turn, number_text(trial["value"]), params, took, trial["run_id"])


def _cut(reason: str) -> str:
    """Why a trial has failed, as far as a row has room for it."""
    return reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"


def trial_table(told: Mapping[str, Any], limit: int | None = None) -> Table:
    """The trials of a sweep."""
    metric = told["spec"].get("metric") or "value"
    of_population = any(trial.get("generation") is not None for trial in told["trials"])
    turn = ["generation", "from"] if of_population else []
    headings = ["trial", "state", *turn, metric, "parameters", "took", "run"]
    rows = [_row(trial, of_population) for trial in _ranked(told)[:limit]]
    return Table(headings, rows, "No trial has begun yet.")


def summary(told: Mapping[str, Any]) -> str:
    """How far it is, in one line."""
    counts: dict[str, int] = {}
    for trial in told["trials"]:
        counts[trial["state"]] = counts.get(trial["state"], 0) + 1
    total = told["spec"].get("trials", 20)
    parts = [f"{counts[state]} {state}" for state in sorted(counts)]
    took = span((told["ended"] or time.time()) - told["created"])
    num_trials = len(told["trials"]) - counts.get("stopped", 0)  # which are not counted when the sweep goes on
    line = f"{told['name']}: {told['state']} · {num_trials} of {total} trials"
    return " · ".join([f"{line} ({', '.join(parts)})" if parts else line, took])


def best_line(told: Mapping[str, Any]) -> str:
    """The best so far, in one line; "" while there is none."""
    best = told["best"]
    if best is None:
        return ""
    metric = told["spec"].get("metric") or "value"
    values = f" ({params_text(best['params'])})" if best["params"] else ""
    return f"best: {metric} {number_text(best['value'])} in trial {best['number']}{values}"


def _failures(told: Mapping[str, Any]) -> str:
    """What went wrong first, of a sweep that goes on all the same; "" when nothing did."""
    failed = [trial for trial in told["trials"] if trial["state"] in FAILED and trial["reason"]]
    if not failed or told["state"] == "failed":  # which says it itself
        return ""
    first = min(failed, key=lambda trial: int(trial["number"]))
    what = f"{len(failed)} trials failed, the first" if len(failed) > 1 else "1 trial failed"
    return f"{what} ({first['number']}): {_cut(first['reason'])}"


def _asks_nothing(told: Mapping[str, Any]) -> str:
    """Of a cell that is the same in every trial."""
    done = [trial for trial in told["trials"] if trial["state"] == "done"]
    if not done or any(trial["params"] for trial in told["trials"]):
        return ""
    return "the cell asks for no value, so its trials are alike: trial.suggest_float(...) and the like ask for one."


def lines_of(told: Mapping[str, Any]) -> list[str]:
    """What is said above the table."""
    lines = [summary(told), best_line(told), _failures(told), _asks_nothing(told), told["note"]]
    if told["state"] != "running":
        lines.append(told["reason"] if told["state"] == "finished" else "")
        if told["best"] is not None and told["spec"].get("save"):
            lines.append(f"%serve {told['best']['run_id']} serves the model of the best trial.")
    if told["importance"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in told["importance"].items())
        lines.append(f"importance: {shares}")
    return [line for line in lines if line]


def text_of(told: Mapping[str, Any]) -> str:
    """All of it as text, for a terminal and a saved notebook."""
    table = repr(trial_table(told, SHOWN))
    more = len(told["trials"]) - SHOWN
    tail = [f"... and {more} more: %sweeps show {told['name']}"] if more > 0 else []
    return "\n".join([*lines_of(told), "", table, *tail])


def html_of(told: Mapping[str, Any]) -> str:
    """The same as HTML, with pictures once it has ended."""
    head = "".join(f"<div>{html.escape(line)}</div>" for line in lines_of(told))
    more = len(told["trials"]) - SHOWN
    tail = f"<div>… and {more} more: <code>%sweeps show {html.escape(told['name'])}</code></div>" if more > 0 else ""
    drawn = _pictures(told) if told["state"] != "running" else ""
    return f"<div>{head}{trial_table(told, SHOWN)._repr_html_()}{tail}{drawn}</div>"


def _pictures(told: Mapping[str, Any]) -> str:
    done: Sequence[Mapping[str, Any]] = [t for t in told["trials"] if t["value"] is not None and t["params"]]
    maximize = told["spec"].get("direction") == "maximize"
    return parallel_coordinates(done, told["spec"].get("metric") or "value", maximize) + importance_bars(
        told["importance"]
    )


class SweepView:
    """A sweep in the cell that follows it."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown: tuple[Any, ...] = ()
        self._drawn_at = 0.0
        self._stops = False

    def stopping(self) -> None:
        """Stop was pressed."""
        self._stops = True

    def show(self, told: Mapping[str, Any]) -> None:
        """Draw it, when it has changed."""
        key = (told["version"], self._stops)
        if key == self._shown or time.monotonic() - self._drawn_at < REDRAW_S:
            return
        self._shown, self._drawn_at = key, time.monotonic()
        self._draw({**told, "note": "stopping: trials that run now are ended." if self._stops else told["note"]})

    def end(self, told: Mapping[str, Any]) -> None:
        """Draw it as it stays."""
        self._draw(told)

    def _draw(self, told: Mapping[str, Any]) -> None:
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        data = {"text/plain": text_of(told), "text/html": html_of(told)}
        if self._handle is not None:
            self._handle.update(data, raw=True)
        elif getattr(get_ipython(), "kernel", None) is not None:
            self._handle = display(data, raw=True, display_id=True)
        elif told["state"] != "running":
            print(data["text/plain"])
