"""A run that was a trial of a sweep, without its sweep: a `trial` that gives the values which the run had."""

from __future__ import annotations

import inspect

from jupyter_llmcloud.core.search.choices import kept_choices
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.runs import RunRecord
from jupyter_llmcloud.storage.search.sweeps import SweepRecord, SweepStore, TrialRow, run_name

OWNER = "sweep:"  # and its name, of the runs of a sweep
REPORTED = "reported value"  # as in training.search.trials
FIXED = """\
import optuna

{choices}
class _Trial(optuna.trial.FixedTrial):
    def suggest_categorical(self, name, choices):
        kept = _kept_choices(choices)
        return choices[kept.index(super().suggest_categorical(name, kept))]

    def report(self, value, step):
        run.log({{{metric!r}: float(value)}}, step=step)

    generation, parent = {generation!r}, None

    def restore(self, **objects):
        return {{}}

    def save(self, **objects):
        pass

    def keep(self, *names):
        pass

{comment}trial = _Trial({params!r}, number={number})
"""


def fixed_trial(record: RunRecord) -> str:
    """Lines that make the run's `trial`, "" for a run that was none. Raises UsageError when its values are unknown."""
    if not record.owner.startswith(OWNER):
        return ""
    name = record.owner.removeprefix(OWNER)
    try:
        sweep = SweepStore().find(name).read()
    except NotFound:
        raise UsageError(
            f"run {record.run_id} was a trial of the sweep {name!r}, which was deleted, and its values with it: "
            "write them into the cell and run that."
        ) from None
    row = next((row for row in sweep.trials if row.run_id == record.run_id), None)
    if row is None or row.state == "running":
        raise UsageError(f"run {record.run_id} {_why_unknown(record, sweep, row)}")
    return _text(sweep, row)


def _why_unknown(record: RunRecord, sweep: SweepRecord, row: TrialRow | None) -> str:
    if row is not None:
        return f"is a trial of the sweep {sweep.name!r}, which still runs: its values are known when it has ended."
    again = next((row.run_id for row in sweep.trials if record.name == run_name(sweep.name, row.number)), "")
    instead = f" It was run again as {again}: take that." if again else ""
    return f"is no trial of the sweep {sweep.name!r} that is kept.{instead}"


def _text(sweep: SweepRecord, row: TrialRow) -> str:
    early = row.state in ("pruned", "stopped")
    comment = f"# The sweep ended it early ({row.state}); here it goes on to its end.\n" if early else ""
    if row.parent is not None:
        comment += f"# In the sweep it went on from the state of trial {row.parent}; here it begins anew.\n"
    metric = sweep.spec.get("metric") or REPORTED
    generation = row.generation or 0
    return FIXED.format(
        choices=_untyped(inspect.getsource(kept_choices)), metric=metric, comment=comment, params=row.params,
        number=row.number, generation=generation,
    )  # fmt: skip


def _untyped(source: str) -> str:
    """A function for a script, under a name that the script's own code will not use."""
    return source.replace("def ", "def _").replace(": Sequence[Any]) -> list[Any]", ")")
