"""`trial` in a cell of `%%sweep`: Optuna's interface on every rank of a gang.

The first rank asks the study; what it is told, it tells the others through the world's store. So all ranks see the same
values and end at the same step, whatever they do in their collectives meanwhile.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.search.choices import PRUNES_NONE, kept_choices, read_pruner
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.storage.search.study import PRUNED, StudyPlan, make_pruner, make_sampler, open_storage, optuna
from jupyter_llmcloud.storage.search.turns import KEPT, RESTORED, SAVED
from jupyter_llmcloud.training.search import turns

if TYPE_CHECKING:
    from jupyter_llmcloud.training.run import Run

NAME = "trial"
REPORTED = "reported value"  # under which trial.report() is logged when no --metric is named
LONGEST_WAIT_S = 0.02
_storages: dict[str, Any] = {}  # of studies, as long as this process lives: opening one reads all of it


class Trial:
    """One trial: values are proposed by `suggest_...`, results told by `report` or logged as the sweep's metric.

    Attributes:
        number: of the trial in its sweep, from 0.
        generation: of a population (`--prune pbt`), from 0; 0 in any other sweep.
        parent: the trial from whose state this one goes on, None where it begins anew.
    """

    def __init__(self, told: Mapping[str, Any], run: Run, store: Callable[[], Any]) -> None:
        self.number: int = told["number"]
        self._turn: Mapping[str, Any] = told.get("turn") or {}
        self.generation: int = self._turn.get("generation", 0)
        self.parent: int | None = self._turn.get("parent")
        self._plan = StudyPlan(**told["plan"])
        self._run = run
        self._store = store
        self._id = f"{run.id}/{told.get('attempt', 0)}"
        self._num_asked = 0
        self._params: dict[str, Any] = {}
        self._kept: dict[str, None] = {}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._params.items())
        return f"<trial {self.number} of {self._plan.name}: {values or 'nothing asked yet'}>"

    @property
    def params(self) -> dict[str, Any]:
        """What was proposed so far, by name."""
        return dict(self._params)

    # --- proposals ---

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number between `low` and `high`, in powers of ten with `log`, else in multiples of `step` if given."""
        if self._plan.sampler == "grid" and step is None and low != high:
            raise UsageError(
                f"--sampler grid tries every combination, and {name!r} has no end of values between {low} and {high}: "
                "give it step=..., name some with suggest_categorical, or take another --sampler."
            )
        return float(self._propose(name, lambda known: known.suggest_float(name, low, high, step=step, log=log)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self._propose(name, lambda known: known.suggest_int(name, low, high, step=step, log=log)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of some choices. What is no text, number, True, False or None is kept by its name, or as it is shown."""
        listed = list(choices)
        kept = kept_choices(listed)

        def index(known: Any) -> int:
            value = known.suggest_categorical(name, kept)
            return next(at for at, item in enumerate(kept) if item is value or item == value)

        self._params[name] = value = listed[self._agree(f"suggest {name!r}", lambda: index(self._optuna))]
        return value

    # --- as older programs write it ---

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """As `suggest_float(name, low, high)`."""
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """As `suggest_float(name, low, high, log=True)`."""
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """As `suggest_float(name, low, high, step=q)`."""
        return self.suggest_float(name, low, high, step=q)

    def _propose(self, name: str, ask: Callable[[Any], Any]) -> Any:
        self._params[name] = value = self._agree(f"suggest {name!r}", lambda: ask(self._optuna))
        return value

    # --- results ---

    def report(self, value: float, step: int) -> None:
        """The value so far, at a step. The last one is that of the trial."""
        number = float(value)
        if self._run.rank == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a step that is reported again, after the ranks were lost
                self._optuna.report(number, step)
        self._run.log({self._plan.metric or REPORTED: number}, step=step)

    def should_prune(self) -> bool:
        """Whether the trial is to end, by `raise optuna.TrialPruned()`; the same on every rank."""
        if read_pruner(self._plan.prune).name in PRUNES_NONE:
            return False
        return bool(self._agree("should_prune()", self._prunes_now))

    def _prunes_now(self) -> bool:
        return bool(self._optuna.should_prune())

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep something with the trial in its study."""
        if self._run.rank == 0:
            self._optuna.set_user_attr(key, value)

    def note_pruned(self) -> None:
        """The cell has ended itself as pruned."""
        self.set_user_attr(PRUNED, True)

    # --- a population ---

    def restore(self, **objects: Any) -> dict[str, Any]:
        """Go on from the state of the parent: `trial.restore(model=model, optimizer=optimizer)`, on every rank.

        Weights, an optimizer's moments, how far a schedule is and random numbers are those that `trial.save` has kept
        under these names; rates and other settings stay as this trial has made them. Returns the plain values that
        were kept beside, by name; {} where the trial begins anew, as in a sweep without `--prune pbt`.
        """
        if self.parent is None:
            return {}
        found = turns.restore(Path(self._turn["restores"]), self._run.rank, self._run.world_size, self.parent, objects)
        self.set_user_attr(RESTORED, True)
        return found

    def keep(self, *names: str) -> None:
        """Have values stay with the state, whoever takes it over: those on which the shape of the model depends."""
        if unknown := [name for name in names if name not in self._params]:
            raise UsageError(f"trial.keep: no value {unknown[0]!r} was suggested before.")
        self._kept.update(dict.fromkeys(names))
        if self._turn:
            self.set_user_attr(KEPT, list(self._kept))

    def save(self, **objects: Any) -> None:
        """Leave the state from which others may go on, on every rank: `trial.save(model=model, optimizer=optimizer)`.

        Models, optimizers, schedules and what else has state_dict() and load_state_dict(); loaders, for the order of
        their rows; and plain values, as in `epoch=epoch`. In a sweep without `--prune pbt` it does nothing.
        """
        if self._turn:
            turns.save(Path(self._turn["saves"]), self._run.rank, self._run.world_size, objects)
            self.set_user_attr(SAVED, True)

    # --- the study, and the other ranks ---

    @cached_property
    def _optuna(self) -> Any:
        """Optuna's own trial; on the first rank only."""
        library, plan = optuna(), self._plan
        storage = _storages.get(plan.storage)
        if storage is None:
            storage = _storages[plan.storage] = open_storage(plan.storage)
        # Another seed for each trial: its sampler is new, and would propose what the one before it has.
        seed = None if plan.seed is None else plan.seed * 1_000_003 + self.number
        sampler = make_sampler(plan.sampler, seed if seed is None else seed % 2**32, plan.num_parallel)
        study = library.load_study(
            study_name=plan.name, storage=storage, sampler=sampler, pruner=make_pruner(plan.prune)
        )
        study_id = storage.get_study_id_from_name(plan.name)
        return library.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, self.number))

    def _agree(self, what: str, decide: Callable[[], Any]) -> Any:
        self._num_asked += 1
        if self._run.world_size == 1:
            return decide()
        key = f"llmcloud/trial/{self._id}/{self._num_asked}"
        if self._run.rank:
            return self._hear(key, what)
        try:
            value = decide()
        except Exception as error:
            self._tell(key, {"what": what, "error": f"{type(error).__name__}: {error}"})
            raise
        self._tell(key, {"what": what, "value": value})
        return value

    def _tell(self, key: str, told: dict[str, Any]) -> None:
        self._store().set(key, json.dumps(told))

    def _hear(self, key: str, what: str) -> Any:
        store, wait_s = self._store(), 0.0005
        while not store.check([key]):  # not wait(), which no Stop ends
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        told = json.loads(store.get(key))
        if told["what"] != what:
            raise UsageError(
                f"rank {self._run.rank} asked the trial for {what} where rank 0 asked for {told['what']}: "
                "every rank must ask for the same, in the same order."
            )
        if "error" in told:
            raise UsageError(f"rank 0 could not answer {what}: {told['error']}")
        return told["value"]


def unless_pruned(error: BaseException | None, cell: Execute, namespace: Mapping[str, Any]) -> BaseException | None:
    """The error of a cell; none of a trial that has ended itself as pruned, which is noted."""
    is_pruned = error is not None and type(error).__name__ == "TrialPruned" and cell.trial
    trial = namespace.get(NAME)
    if not is_pruned or not isinstance(trial, Trial):
        return error
    trial.note_pruned()
    return None


def forget(namespace: dict[str, Any], initial_names: Iterable[str]) -> None:
    """Drop what a trial has made: the next one has the memory, and finds nothing of it."""
    for name in namespace.keys() - set(initial_names):
        del namespace[name]
    gc.collect()
