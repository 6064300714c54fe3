"""Where a cell is, and what it trains: its frames and variables, its optimizers, Accelerators and Trainers."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from jupyter_llmcloud.training.checkpoint import serving_files, stateful_objects
from jupyter_llmcloud.training.object_graph import memory
from jupyter_llmcloud.training.object_graph.graph import MAY, Graph
from jupyter_llmcloud.training.resume.cell import frame_variables
from jupyter_llmcloud.training.resume.cell.objects import Scope
from jupyter_llmcloud.training.resume.cell.optimizers import SteppedOptimizers
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition
from jupyter_llmcloud.training.resume.loaders.registry import LoaderRegistry
from jupyter_llmcloud.training.resume.loops.tracking import Loops
from jupyter_llmcloud.training.resume.trainer_resume import Trainings

_VARIABLE = "variable "  # how the address of an object begins that a variable leads to


class CellContext:
    """What surrounds the code of a cell that runs now.

    Attributes:
        optimizers: those that have stepped.
    """

    def __init__(self, loops: Loops, trainings: Trainings, loaders: LoaderRegistry) -> None:
        self._loops = loops
        self._trainings = trainings
        self._loaders = loaders
        self.optimizers = SteppedOptimizers()
        self._run_id, self._before = "", set[str]()
        self._prepared_before: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by Accelerator
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        self.optimizers.clear()
        self._accelerators_made: list[weakref.ref[Any]] = []
        self._known: list[weakref.ref[Any]] = []  # of earlier cells
        self._namespace: dict[str, Any] = {}
        self._given: set[str] = set()

    def begin(self, run_id: str, namespace: dict[str, Any], given: set[str]) -> None:
        """A cell begins; `given` are names that every namespace starts with."""
        self._namespace, self._given = namespace, given
        if run_id == self._run_id:
            self._forget_last_attempt()
        known = _accelerators_in(namespace.values())
        self._known = [weakref.ref(value) for value in known]
        if run_id != self._run_id:
            self._run_id, self._before = run_id, set(namespace)
            self._prepared_before.clear()
            self._prepared_before.update({value: stateful_objects.lists_of(value) for value in known})
        for value in known:  # what is prepared again gets the number that it had when it was saved
            stateful_objects.put_lists(value, self._prepared_before.get(value, {}))

    def _forget_last_attempt(self) -> None:
        """Executed again, the cell finds what it would in a new process: what it had made itself would be taken for
        something that it makes before it trains, which no checkpoint need hold.
        """
        for name in self._namespace.keys() - self._before - self._given:
            if frame_variables.is_users(name) and not frame_variables.is_ours(name):
                del self._namespace[name]

    def write_serving_files(self, names: list[str], run: Path) -> None:
        """Write beside the checkpoints what is needed to serve them."""
        serving_files.write_once(names, self._namespace, run)

    def note_accelerator(self, accelerator: Any) -> None:
        """An Accelerator was made."""
        self._accelerators_made.append(weakref.ref(accelerator))

    # --- code ---

    def frames(self) -> list[FrameType]:
        """The frames of the notebook's own code that led here, outermost first."""
        return frame_variables.user_frames(self._namespace)

    def refuse_what_is_not_followed(self, frames: list[FrameType], position: ReplayPosition) -> None:
        """Raise RuntimeError where the code could not be led back to this position."""
        if position["kind"] == "loader" and (what := frame_variables.unfollowed_loop()):
            raise RuntimeError(
                f"the loop that draws the batches, in {what}, is not followed. A `for` loop of a cell, or of a module "
                "of yours, is; after a restart the cell runs from its start"
            )
        if frame_variables.trainer_runs() and self._trainings.active is None:
            raise RuntimeError(
                "this Trainer drives a loop of its own that is not followed; after a restart the cell runs from its "
                "start"
            )
        iterators = [*frame_variables.used_values(frames), *(loop.source for loop in self._loops.nest())]
        if any(map(frame_variables.keeps_batches, iterators)):
            raise RuntimeError(
                "itertools.cycle repeats the batches of its first pass, which are not saved; write "
                "`while True: yield from loader` instead. After a restart the cell runs from its start"
            )

    def same_bodies(self) -> Callable[[], bool]:
        """Tells later whether the bodies that run now still do: what they have made they make again."""
        running = [loop for loop in [*self._loops.nest(), *self._loops.whiles()] if loop.in_body]
        bodies = [(weakref.ref(loop), loop.delivered) for loop in running]
        return lambda: all(
            (loop := ref()) is not None and loop.in_body and loop.delivered == number for ref, number in bodies
        )

    # --- variables ---

    def scope(self, frames: list[FrameType]) -> Scope:
        """The variables that these frames see, and what is saved of them in another way."""
        trainings = self._trainings
        return Scope(
            frames=frames,
            given=self._given,
            before=self._before,
            attributes=trainings.attributes(),
            always=trainings.always(),
            sources=[loop.source for loop in self._loops.nest()],
            followed=[*self.optimizers, *trainings.left_behind(), *self._trained_tensors()],
            loaders=self._loaders.used().values(),
        )

    def with_state(self, graph: Graph) -> dict[str, Any]:
        """What has a state of its own, by address."""
        table = stateful_objects.of_accelerators(self.accelerators(), self._loops.not_made_again())
        table |= self._trainings.addresses()
        for path, value in graph.paths.items():
            if not callable(getattr(type(value), "state_dict", None)) or isinstance(value, type):
                continue
            if not (isinstance(value, torch.amp.GradScaler) and graph.entry_of(value).need == MAY):  # of another cell
                table[_VARIABLE + path] = value
        return table

    # --- what is trained ---

    def _trained_tensors(self) -> list[torch.Tensor]:
        return [p for optimizer in self.optimizers for p in stateful_objects.parameters_of(optimizer)]

    def trained_memory(self) -> set[int]:
        """Where the memory of the trained tensors begins."""
        return {start for tensor in self._trained_tensors() if (start := memory.start_of(tensor))}

    def optimizers_in(self, table: dict[str, Any]) -> list[Any]:
        """The optimizers of the training that goes on: those of loops that lie behind are let go."""
        if any(not stateful_objects.is_in(table, optimizer) for optimizer in self.optimizers):
            gc.collect()
        behind = {id(optimizer) for optimizer in self._trainings.left_behind()}
        return [optimizer for optimizer in self.optimizers if id(optimizer) not in behind]

    def accelerators(self) -> dict[str, Any]:
        """The Accelerators of the cell by name: those it has made, else those of earlier cells that it trains with."""
        trainers = {id(item) for item in self._trainings.accelerators()}
        left_out = trainers | self._loops.not_made_again()
        made = [item for ref in self._accelerators_made if (item := ref()) is not None and id(item) not in left_out]
        if made:
            return {str(number): item for number, item in enumerate(made)}
        known = {id(value) for value in _accelerators_in(self._namespace.values()) if self._trains_with(value)}
        return {name: value for name, value in self._namespace.items() if id(value) in known}

    def prepared(self) -> list[weakref.ref[Any]]:
        """The Accelerators that the cell may train with, and what they have prepared."""
        refs = [*self._known, *self._accelerators_made]
        owners = [item for ref in refs if (item := ref()) is not None]
        return refs + [ref for owner in owners for ref in stateful_objects.prepared_by(owner)]

    def _trains_with(self, accelerator: Any) -> bool:
        return any(getattr(item, "optimizer", item) in self.optimizers for item in accelerator._optimizers)

    def accelerators_named(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the saved cell as far as they are there."""
        made = self.accelerators()
        return {name: item for name in names if (item := made.get(name) or self._namespace.get(name)) is not None}


def by_first_names(table: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """What has several names by that which it had when the training began: `for net in (actor, critic)` gives others.

    Executed again, the cell has made the object by then, but has not run the loop that gave it another name.
    """
    return {at: value for at, value in table.items() if not _has_earlier_name(at, value, graph)}


def _has_earlier_name(address: str, value: Any, graph: Graph) -> bool:
    if not address.startswith(_VARIABLE):
        return False
    first = graph.entry_of(value).address
    return address != _VARIABLE + first and graph.paths.get(first) is value


def _accelerators_in(values: Iterable[Any]) -> list[Any]:
    accelerate = sys.modules.get("accelerate")
    kind = accelerate.Accelerator if accelerate is not None else ()
    return [value for value in values if issubclass(type(value), kind)]
