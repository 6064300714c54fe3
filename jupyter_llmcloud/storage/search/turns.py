"""The turns of a population in Optuna's study: where each goes on and with which values, kept before it begins.

<root>/sweeps/<name>/population/0007/   the state that trial 7 has left for those that go on from it
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.search.population import (
    ChoiceRange,
    NumberRange,
    Origin,
    Population,
    Turn,
    moved,
    origin,
)
from jupyter_llmcloud.storage.search.study import MARK, SweepStudy

TURN = f"{MARK}:turn"  # attribute of a trial: {"generation", "parent", "moves"}
RESTORED = f"{MARK}:restored"  # attribute of one whose cell has asked for the state of its parent
KEPT = f"{MARK}:kept"  # names of values that stay with the state
SAVED = f"{MARK}:saved"  # of one whose cell has left a state


@dataclass(frozen=True)
class PlannedTurn:
    """What a trial of a population is told; crosses to the ranks as a dict.

    Attributes:
        generation: from 0.
        parent: the trial from whose state it goes on; None where it begins anew.
        restores, saves: folders of states; `restores` is "" without a parent.
    """

    generation: int
    parent: int | None
    restores: str
    saves: str

    def as_dict(self) -> dict[str, Any]:
        """For the ranks."""
        return asdict(self)


class TurnPlanner:
    """Decides and keeps the turns of one sweep; used in the thread of its study.

    Args:
        folder: of the sweep.
    """

    def __init__(self, study: SweepStudy, population: Population, folder: Path) -> None:
        self.population = population
        self._study = study
        self._folder = folder / "population"

    def begin(self, number: int) -> PlannedTurn:
        """Have a trial of this number, which goes on where its turn says. What was decided before is kept."""
        known = self._study.attributes(number).get(TURN)
        if known is None:
            found, attributes, fixed = self._decide(number)
            self._study.begin(number, attributes, fixed)
        else:
            found = None if known["parent"] is None else Origin(known["parent"], known["moves"])
            self._study.begin(number)
        self._let_go(number)
        parent = found.parent if found is not None else None
        restores = str(self._state_of(parent)) if parent is not None else ""
        saves = self._state_of(number)
        saves.mkdir(mode=0o700, parents=True, exist_ok=True)
        return PlannedTurn(self.population.generation(number), parent, restores, str(saves))

    def _decide(self, number: int) -> tuple[Origin | None, dict[str, Any], dict[str, Any]]:
        plan, trials = self._study.plan, self._study.trials()
        first = self.population.generation(number) * self.population.size
        turns = [_turn(trial) for trial in trials if trial.number < first]
        draw = random.Random(None if plan.seed is None else f"{plan.seed}/{number}")
        found = origin(number, turns, self.population, plan.direction == "maximize", draw)
        about: dict[str, Any] = {"generation": self.population.generation(number), "parent": None, "moves": False}
        if found is None:
            return None, {TURN: about}, {}
        parent = next(trial for trial in trials if trial.number == found.parent)
        values = dict(parent.params)
        if found.moves:
            kept = parent.user_attrs.get(KEPT, [])
            ranges = {name: _range(item) for name, item in parent.distributions.items() if name not in kept}
            values = moved(values, ranges, self.population.resample, draw)
        return found, {TURN: {**about, "parent": found.parent, "moves": found.moves}}, values

    def why_incomplete(self, number: int) -> str:
        """What the cell of a trial that has ended well has left out, in words; "" when it has done its part."""
        attributes = self._study.attributes(number)
        parent = attributes.get(TURN, {}).get("parent")
        if parent is not None and not attributes.get(RESTORED):
            return (
                f"trial {number} was to go on from the state of trial {parent}, and began anew: call "
                "trial.restore(model=model, optimizer=optimizer) before the training."
            )
        if not attributes.get(SAVED):
            return (
                f"trial {number} has left no state from which others could go on: call "
                "trial.save(model=model, optimizer=optimizer) after the training."
            )
        return ""

    # --- states ---

    def _state_of(self, number: int) -> Path:
        return self._folder / f"{number:04d}"

    def _let_go(self, number: int) -> None:
        """Remove the states of generations from which nothing goes on any more."""
        generation = self.population.generation(number)
        done = [turn.number for turn in map(_turn, self._study.trials()) if turn.value is not None]
        older = [self.population.generation(one) for one in done if self.population.generation(one) < generation]
        if older and self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name.isdigit() and self.population.generation(int(path.name)) < max(older):
                    shutil.rmtree(path, ignore_errors=True)


def _turn(trial: Any) -> Turn:
    is_done = trial.state.name == "COMPLETE" and trial.user_attrs.get(SAVED)
    return Turn(trial.number, float(trial.values[0]) if is_done else None)


def _range(distribution: Any) -> NumberRange | ChoiceRange:
    choices: Sequence[Any] | None = getattr(distribution, "choices", None)
    if choices is not None:
        return ChoiceRange(tuple(choices))
    is_whole = isinstance(distribution.low, int)
    step = None if distribution.log else distribution.step
    return NumberRange(distribution.low, distribution.high, step, distribution.log, is_whole)
