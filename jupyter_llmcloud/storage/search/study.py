"""The study of a sweep, kept by Optuna: opened, asked and told. Optuna is imported with the first study."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.search.choices import PRUNES_NONE, read_pruner
from jupyter_llmcloud.errors import NameTaken, NotFound, UsageError
from jupyter_llmcloud.storage.search.sweeps import without_password

MARK = "llmcloud"  # attribute of a study that a sweep has made: {"metric", "direction"}
PRUNED = "llmcloud:pruned"  # attribute of a trial that has ended itself, as pruned
DATABASES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")
LOCKED_AFTER_S = 5
# What samplers import only when they propose, and how it is installed.
NEEDED = {"cmaes": {"cmaes": "'jupyter-llmcloud[search]'"}, "gp": {"scipy": "scipy", "torch": "torch"}}


@dataclass(frozen=True)
class StudyPlan:
    """Which study, and how it proposes and prunes; crosses to the ranks as a dict.

    Attributes:
        storage: a URL, or the path of a journal file.
        num_parallel: trials at the same time.
    """

    storage: str
    name: str
    direction: str = "minimize"
    metric: str = ""
    sampler: str = "tpe"
    prune: str = "none"
    seed: int | None = None
    num_parallel: int = 1


def optuna() -> Any:
    """The library. Raises UsageError that says how to get it."""
    try:
        module = importlib.import_module("optuna")
    except ImportError:
        raise UsageError("Optuna is not installed here: pip install 'jupyter-llmcloud[search]'.") from None
    module.logging.set_verbosity(module.logging.WARNING)
    return module


def storage_place(text: str | None, journal: Path) -> str:
    """Where a study is kept: a URL as it is, else the absolute path of a journal file."""
    if not text:
        return str(journal)
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def absolute_storage(text: str, folder: str) -> str:
    """The same place for every process, whatever folder it works in: a file that is named from `folder` by its path.

    Raises UsageError for a database in the memory of one process.
    """
    prefix, colon, path = text.partition("://")
    if not colon:
        return os.path.abspath(os.path.join(folder, os.path.expanduser(text)))
    if prefix.partition("+")[0] != "sqlite":
        return text
    file = path.removeprefix("/").partition("?")[0]
    if file in ("", ":memory:"):
        raise UsageError(f"--storage {text}: ranks could not see it. Name a file: sqlite:///study.db.")
    return f"{prefix}:///{os.path.abspath(os.path.join(folder, os.path.expanduser(file)))}{path[1 + len(file) :]}"


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """What a storage refuses, in one sentence that names it."""
    try:
        yield
    except (UsageError, NameTaken, NotFound):
        raise
    except Exception as error:
        words = f"{error.__cause__ or error}".strip().partition("\n")[0]
        kind = "is locked by another process" if "locked" in words.lower() else "cannot be used"
        where = without_password(place)
        raise UsageError(f"the storage {where} {kind}: {type(error).__name__}: {words:.300}") from None


LONGEST_TORN = 1 << 20


def open_storage(place: str) -> Any:
    """Optuna's storage at a URL or a path. Raises UsageError."""
    library = optuna()
    scheme = place.partition("://")[0].partition("+")[0] if "://" in place else ""
    with _explained(place):
        if scheme in ("redis", "rediss"):
            from optuna.storages.journal import JournalRedisBackend

            return library.storages.JournalStorage(JournalRedisBackend(place))
        if scheme in DATABASES:
            is_file = scheme == "sqlite"
            arguments = {"connect_args": {"timeout": LOCKED_AFTER_S}} if is_file else {"pool_pre_ping": True}
            return library.storages.RDBStorage(place, engine_kwargs=arguments)
        if scheme:
            allowed = ", ".join(f"{name}://" for name in (*DATABASES, "redis"))
            raise UsageError(f"--storage {scheme}://: choose {allowed}, or the path of a journal file.")
        return _journal(library, place)


def _journal(library: Any, place: str) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    class WholeLines(JournalFileBackend):
        """Takes away what a full disk has left of a line: with the next one behind it nobody could read on."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lock.acquire()
            try:
                _cut_torn_line(Path(place))
            finally:
                lock.release()
            super().append_logs(logs)

    folder = Path(place).parent
    if not folder.is_dir():
        raise UsageError(f"--storage {place}: there is no folder {folder}.")
    lock = JournalFileSymlinkLock(place)
    return library.storages.JournalStorage(WholeLines(place, lock))


def _cut_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(max(0, size - LONGEST_TORN))
        tail = file.read()
        end = size - len(tail) + tail.rfind(b"\n") + 1
        if end < size:
            file.truncate(end)


def check_sampler(name: str) -> None:
    """Raise UsageError when something that a sampler needs is not installed here."""
    for module, package in NEEDED.get(name, {}).items():
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"--sampler {name} needs {module}, which is not installed here: pip install {package}, "
                "or take another --sampler."
            )


def make_sampler(name: str, seed: int | None, num_parallel: int = 1) -> Any:
    """One of Optuna's. Raises UsageError when something that it needs is not installed."""
    check_sampler(name)
    samplers = optuna().samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some of them are new
        match name:
            case "tpe":
                return samplers.TPESampler(seed=seed, constant_liar=num_parallel > 1)
            case "gp":
                return samplers.GPSampler(seed=seed)
            case "cmaes":
                return samplers.CmaEsSampler(seed=seed)
            case "grid":
                return samplers.BruteForceSampler(seed=seed)
            case _:
                return samplers.RandomSampler(seed=seed)


def make_pruner(text: str) -> Any:
    """One of Optuna's."""
    pruners, choice = optuna().pruners, read_pruner(text)
    given = choice.settings
    match choice.name:
        case "asha":
            return pruners.SuccessiveHalvingPruner(
                min_resource=given.get("min", 1), reduction_factor=given.get("reduction", 3)
            )
        case "hyperband":
            most = given.get("max", "auto")
            least, factor = given.get("min", 1), given.get("reduction", 3)
            return pruners.HyperbandPruner(min_resource=least, max_resource=most, reduction_factor=factor)
        case "median":
            return pruners.MedianPruner(given.get("startup", 5), given.get("warmup", 0))
        case "patient":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is new
                return pruners.PatientPruner(None, patience=given.get("patience", 3))
        case _:
            return pruners.NopPruner()


def _template(about: Mapping[str, Any] | None, values: Mapping[str, Any] | None) -> Any:
    """A trial that begins with what is known of it, in one write: a killed server leaves all of it or nothing."""
    if not about and not values:
        return None
    trials = optuna().trial
    return trials.create_trial(
        state=trials.TrialState.RUNNING,
        user_attrs=dict(about or {}),
        system_attrs={"fixed_params": dict(values)} if values else {},
    )


class SweepStudy:
    """A study as whoever drives the sweep uses it, in one thread.

    Attributes:
        plan: what ranks need to take part.
        is_exhausted: whether every combination has been tried.
    """

    def __init__(self, plan: StudyPlan, storage: Any, study: Any) -> None:
        self.plan = plan
        self.is_exhausted = False
        self._storage = storage
        self._study = study
        self._study_id = storage.get_study_id_from_name(plan.name)
        study.stop = self._note_exhausted  # which Optuna allows in its own loop only
        self._prunes = read_pruner(plan.prune).name not in PRUNES_NONE

    @classmethod
    def create(cls, plan: StudyPlan) -> SweepStudy:
        """A new study. Raises NameTaken when the storage has one of this name, UsageError for one of no use."""
        library, storage = optuna(), open_storage(plan.storage)
        known = cls._known(library, storage, plan)
        if known is not None and MARK not in (known.user_attrs or {}):
            raise NameTaken(
                f"the storage {without_password(plan.storage)} has a study {plan.name!r} of another program: choose "
                "another --name."
            )
        if known is not None:
            what = f"the storage {without_password(plan.storage)} has a study {plan.name!r} already"
            raise NameTaken(
                f"{what}, with {known.n_trials} trials: --resume goes on with it, or choose another --name."
            )
        with _explained(plan.storage):
            study = library.create_study(
                study_name=plan.name, storage=storage, direction=plan.direction, **cls._parts(plan)
            )
            study.set_user_attr(MARK, {"metric": plan.metric, "direction": plan.direction})
        return cls(plan, storage, study)

    @classmethod
    def reopen(cls, plan: StudyPlan) -> SweepStudy:
        """The study of a sweep that goes on. Raises UsageError when it is another one's."""
        library, storage = optuna(), open_storage(plan.storage)
        known = cls._known(library, storage, plan)
        where = without_password(plan.storage)
        if known is None:
            raise NotFound(f"the storage {where} has no study {plan.name!r}.")
        mark = (known.user_attrs or {}).get(MARK)
        if mark is None:
            raise UsageError(f"the study {plan.name!r} in {where} is of another program: choose another --name.")
        mine = {"metric": plan.metric, "direction": plan.direction}
        if mark != mine:
            was = f"{mark['direction']} {mark['metric'] or 'what is reported'}"
            now = f"{plan.direction} {plan.metric or 'what is reported'}"
            raise UsageError(
                f"the study {plan.name!r} is to {was}, not to {now}: leave that as it was, or choose another --name."
            )
        with _explained(plan.storage):
            study = library.load_study(study_name=plan.name, storage=storage, **cls._parts(plan))
            found = cls(plan, storage, study)
            found._look_for_end()
        return found

    @staticmethod
    def _parts(plan: StudyPlan) -> dict[str, Any]:
        check_sampler(plan.sampler)
        # Ranks propose. What is done here after a trial concerns the search of every combination alone.
        sampler = make_sampler("grid" if plan.sampler == "grid" else "random", plan.seed)
        return {"sampler": sampler, "pruner": make_pruner(plan.prune)}

    @staticmethod
    def _known(library: Any, storage: Any, plan: StudyPlan) -> Any:
        with _explained(plan.storage):
            found = library.get_all_study_summaries(storage)
        return next((summary for summary in found if summary.study_name == plan.name), None)

    def _look_for_end(self) -> None:
        done = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        if self.plan.sampler == "grid" and done:  # the sampler looks after each trial, at all of them
            self._study.sampler.after_trial(self._study, done[-1], done[-1].state, done[-1].values)

    def _note_exhausted(self) -> None:
        self.is_exhausted = True

    def explained(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call one of the methods below. Raises UsageError in place of what the storage raises."""
        with _explained(self.plan.storage):
            return function(*arguments)

    # --- trials ---

    def states(self) -> dict[int, str]:
        """The state of each trial by its number, in Optuna's words."""
        return {trial.number: trial.state.name for trial in self._study.get_trials(deepcopy=False)}

    def trials(self) -> list[Any]:
        """Optuna's own, in order; not to be changed."""
        found: list[Any] = self._study.get_trials(deepcopy=False)
        return found

    def attributes(self, number: int) -> dict[str, Any]:
        """What is kept with a trial; nothing of one that has not begun."""
        return next((dict(trial.user_attrs) for trial in self.trials() if trial.number == number), {})

    def begin(
        self, number: int, about: Mapping[str, Any] | None = None, values: Mapping[str, Any] | None = None
    ) -> None:
        """Have a trial of this number, with what is kept `about` it and the `values` that it is given.

        Raises UsageError when others add trials, too.
        """
        if number in (states := self.states()):
            if states[number] != "RUNNING":
                raise UsageError(f"trial {number} of the study {self.plan.name!r} has ended by other hands.")
            return
        with _explained(self.plan.storage):
            trial_id = self._storage.create_new_trial(self._study_id, _template(about, values))
            made = self._storage.get_trial_number_from_id(trial_id)
        if made != number:
            raise UsageError(
                f"the study {self.plan.name!r} has trials of others: expected number {number}, got {made}."
            )

    def _id(self, number: int) -> int:
        found: int = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return found

    def report(self, number: int, values: list[tuple[int, float]]) -> bool:
        """Values by step of a trial that goes on; returns whether it is to end now."""
        if not self._prunes:
            return False
        trial_id = self._id(number)
        for step, value in values:
            self._storage.set_trial_intermediate_value(trial_id, step, value)
        trial = self._storage.get_trial(trial_id)
        return bool(self._study.pruner.prune(self._study, trial))

    def params(self, number: int) -> dict[str, Any]:
        """What was proposed."""
        return dict(self._storage.get_trial(self._id(number)).params)

    def has_pruned_itself(self, number: int) -> bool:
        """Whether its cell has raised optuna.TrialPruned."""
        return bool(self._storage.get_trial(self._id(number)).user_attrs.get(PRUNED))

    def end(self, number: int, kind: str, value: float | None, step: int | None, about: dict[str, Any]) -> None:
        """A trial has ended; what is said `about` it stays with it.

        Raises UsageError, once that is kept, when the sampler can learn nothing of such trials.
        """
        trial_id, state = self._id(number), optuna().trial.TrialState
        for name, item in about.items():
            self._storage.set_trial_user_attr(trial_id, f"{MARK}:{name}", item)
        if value is not None and math.isfinite(value) and step is not None:
            self._storage.set_trial_intermediate_value(trial_id, step, value)
        if kind == "done":
            self._study.tell(number, value)
            self._check_numbers(trial_id)
        else:
            self._study.tell(number, state=state.PRUNED if kind == "pruned" else state.FAIL)

    def _check_numbers(self, trial_id: int) -> None:
        """CMA-ES moves numbers that all trials have; without any, Optuna would go on at random and say nothing."""
        if self.plan.sampler != "cmaes":
            return
        distributions = self._storage.get_trial(trial_id).distributions
        if not any(hasattr(item, "low") and not item.single() for item in distributions.values()):
            asked = f"{', '.join(distributions)} only" if distributions else "none"
            raise UsageError(
                "--sampler cmaes needs numbers to search (suggest_float, suggest_int), and would draw all else at "
                f"random; the trial asked for {asked}. Go on with --resume --sampler tpe."
            )

    def importance(self) -> dict[str, float]:
        """Of each parameter, between 0 and 1; empty while too little is known."""
        library = optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = library.importance.get_param_importances(self._study)
            except Exception:  # of few or equal values; a sweep does not fail for what only informs
                return {}
        return {name: round(float(weight), 4) for name, weight in found.items() if math.isfinite(weight)}
