"""What a checkpoint holds of a rank's cell: taken at the saved place, put back when the cell is there again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.checkpoint import rng, sharded_tensors, stateful_objects, writer
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.object_graph import memory
from jupyter_llmcloud.training.object_graph.graph import MAY, Graph, Identities
from jupyter_llmcloud.training.object_graph.kinds.iterators import FOLLOWED
from jupyter_llmcloud.training.parallel.fully_sharded import settle
from jupyter_llmcloud.training.resume.cell import frame_variables
from jupyter_llmcloud.training.resume.cell.objects import CellObjects, Scope
from jupyter_llmcloud.training.resume.cell.optimizers import KeptGradients
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition
from jupyter_llmcloud.training.resume.replay import ReplayCursor

_SMALL = 4096  # elements: copied at once


class CellState:
    """The state of the cell that a rank executes.

    Attributes:
        objects: what was handed to `run.checkpoint`.
        copies: (buffer, tensor) still to be copied before the next step.
    """

    def __init__(self, place: ReplayCursor, rank: int) -> None:
        self.place = place
        self.rank = rank
        self._cell_objects = CellObjects()
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        self.objects: dict[str, Any] = {}
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._accelerators_made: list[weakref.ref[Any]] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._cell_objects.clear()
        self._namespace: dict[str, Any] = {}
        self._given: set[str] = set()
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._backwards: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # by their last steps
        self._kept_gradients = KeptGradients()
        self._batches_at_step = 0
        self._cannot: Exception | None = None
        self._rng_at_begin: dict[str, Any] = {}

    def begin(self, cell: Execute, namespace: dict[str, Any], given: set[str]) -> None:
        """The cell begins; `given` are names that every namespace starts with."""
        self.cell = cell
        self._namespace, self._given = namespace, given

    def begin_following(self, saved: dict[str, Any] | None) -> None:
        """The cell is followed. One that is executed again draws the same random numbers from its start."""
        if saved is not None and not saved["is_new"]:
            rng.restore(saved["rng_at_begin"])
        self._rng_at_begin = rng.snapshot()

    def note_accelerator(self, accelerator: Any) -> None:
        """An Accelerator was made."""
        self._accelerators_made.append(weakref.ref(accelerator))

    def note_begin(self) -> None:
        """A pass over data begins, or a first step: what is new is remembered as it is now."""
        try:
            frames = frame_variables.user_frames(self._namespace)
            self._cell_objects.remember(self._cell_objects.graph(self._scope(frames)), self._trained_memory())
        except Exception as error:  # the training must not end by what it is looked at with
            self._cannot = error

    def note_step(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self._optimizers.add(optimizer)
        self._backwards[optimizer] = self.place.num_backwards
        self._batches_at_step = self.place.num_batches
        if not self._cell_objects.has_begun:
            self.note_begin()

    def note_backward(self) -> None:
        """Gradients are about to be computed: those that are there after a step were kept over it."""
        self._kept_gradients.look(o for o, number in self._backwards.items() if number == self.place.num_backwards)

    def where(self) -> list[tuple[str, str]]:
        """Which functions run, and which of their instructions."""
        return frame_variables.place_in(frame_variables.user_frames(self._namespace))

    def check(self, objects: dict[str, Any]) -> None:
        """Raise when one of these objects cannot be part of a checkpoint."""
        stateful_objects.find(self._look(frame_variables.user_frames(self._namespace))[2], (), objects)

    def _scope(self, frames: list[Any]) -> Scope:
        trainings = self.place.trainings
        return Scope(
            frames=frames,
            given=self._given,
            attributes=trainings.attributes(),
            always=trainings.always(),
            sources=[loop.source for loop in self.place.loops.nest()],
            followed=[*self._optimizers, *trainings.left_behind(), *self._trained_tensors()],
            loaders=self.place.loaders(),
        )

    def _trained_tensors(self) -> list[torch.Tensor]:
        return [p for optimizer in self._optimizers for p in stateful_objects.parameters_of(optimizer)]

    def _trained_memory(self) -> set[int]:
        return {start for tensor in self._trained_tensors() if (start := memory.start_of(tensor))}

    def _look(self, frames: list[Any], known: Identities | None = None) -> tuple[Scope, Graph, dict[str, Any]]:
        """Where the cell is, its objects, and those of them that have a state of their own by address."""
        scope = self._scope(frames)
        graph = self._cell_objects.graph(scope, known)
        table = self._table(graph)
        if any([settle(value) for value in table.values()]):  # their tensors are other ones now
            scope = self._scope(frames)
            graph = self._cell_objects.graph(scope, known)
            table = self._table(graph)
        return scope, graph, table

    def _table(self, graph: Graph) -> dict[str, Any]:
        table = stateful_objects.of_accelerators(self._accelerators())
        table |= self.place.trainings.addresses()
        for path, value in graph.paths.items():
            if not callable(getattr(type(value), "state_dict", None)) or isinstance(value, type):
                continue
            if not (isinstance(value, torch.amp.GradScaler) and graph.entry_of(value).need == MAY):  # of another cell
                table[f"variable {path}"] = value
        return table

    # --- taking ---

    def take(self, position: ReplayPosition, num_steps: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What the first rank saves for all (None elsewhere), and what this rank saves of its own."""
        if self._cannot is not None:
            raise self._cannot
        frames = frame_variables.user_frames(self._namespace)
        self._refuse_what_is_not_followed(frames, position)
        alone = len(self.cell.ranks) == 1
        _, graph, table = self._look(frames)
        optimizers = self._stepped(table)
        found = stateful_objects.find(table, optimizers, self.objects, alone)
        graph.leave(
            [inner for item in found if not item.is_module for inner in stateful_objects.layers(item.value)], FOLLOWED
        )
        covered = self._trained_memory() | stateful_objects.memory_of(found)
        limit = sum(p.nbytes for item in found if item.is_module for p in item.value.parameters())
        trained = {id(p) for item in found if item.is_optimizer for p in stateful_objects.parameters_of(item.value)}
        accelerators = self._accelerators()
        own = {
            "position": rng.loadable(position),
            "rng": rng.loadable(rng.snapshot()),
            "rng_at_begin": rng.loadable(self._rng_at_begin),
            "frames": frame_variables.names_of(frames),
            "graph": self._cell_objects.take(graph, covered, trained, self._copy, limit),
            "steps": num_steps,
            "world_size": len(self.cell.ranks),
            "accelerators": {
                name: (item.step, item.gradient_state.sync_gradients) for name, item in accelerators.items()
            },
            "gradients": stateful_objects.gradients(
                [item for item in found if self._has_gradients(item.value)], self._copy
            ),
            "is_between_steps": self.place.num_batches > self._batches_at_step,
            "objects": stateful_objects.take(found, False, self._copy, self._copy_later),
        }
        if self.rank != self.cell.ranks[0]:
            return None, own
        return stateful_objects.take(found, True, self._copy, self._copy_later), own

    def changed_while_written(self) -> list[str]:
        """Memory that was too large to be compared at once and has changed: the next checkpoint holds it."""
        return self._cell_objects.changed_while_written()

    def _refuse_what_is_not_followed(self, frames: list[Any], position: ReplayPosition) -> None:
        if position["kind"] == "loader" and (what := frame_variables.unfollowed_loop()):
            raise RuntimeError(
                f"the loop that draws the batches, in {what}, is not followed. A `for` loop of a cell, or of a module "
                "of yours, is; after a restart the cell runs from its start"
            )
        if frame_variables.trainer_runs() and self.place.trainings.active is None:
            raise RuntimeError(
                "this Trainer drives a loop of its own that is not followed; after a restart the cell runs from its "
                "start"
            )
        iterators = [*frame_variables.used_values(frames), *(loop.source for loop in self.place.loops.nest())]
        if any(map(frame_variables.keeps_batches, iterators)):
            raise RuntimeError(
                "itertools.cycle repeats the batches of its first pass, which are not saved; write "
                "`while True: yield from loader` instead. After a restart the cell runs from its start"
            )

    def _stepped(self, table: dict[str, Any]) -> list[Any]:
        """The optimizers of the training that goes on: those of loops that lie behind are let go."""
        if any(not stateful_objects.is_in(table, optimizer) for optimizer in self._optimizers):
            gc.collect()
        behind = {id(optimizer) for optimizer in self.place.trainings.left_behind()}
        return [optimizer for optimizer in self._optimizers if id(optimizer) not in behind]

    def _has_gradients(self, value: Any) -> bool:
        """Whether the next step of an optimizer uses gradients that are there now."""
        optimizer = stateful_objects.inner_optimizer(value)
        if optimizer is None:
            return False
        return self.place.num_backwards > self._backwards.get(optimizer, 0) or self._kept_gradients.may_be_of(optimizer)

    def _accelerators(self) -> dict[str, Any]:
        """The Accelerators of the cell by name: those it has made, else those of earlier cells that it trains with."""
        trainers = {id(item) for item in self.place.trainings.accelerators()}
        made = [item for ref in self._accelerators_made if (item := ref()) is not None and id(item) not in trainers]
        if made:
            return {str(number): item for number, item in enumerate(made)}
        from accelerate import Accelerator

        known = {name: value for name, value in self._namespace.items() if isinstance(value, Accelerator)}
        return {name: value for name, value in known.items() if self._trains_with(value)}

    def _trains_with(self, accelerator: Any) -> bool:
        return any(getattr(item, "optimizer", item) in self._optimizers for item in accelerator._optimizers)

    def _accelerators_of(self, saved: Iterable[str]) -> dict[str, Any]:
        made = self._accelerators()
        return {name: item for name in saved if (item := made.get(name) or self._namespace.get(name)) is not None}

    def _copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory that is kept for the next checkpoint: fresh pages would cost most of the time."""
        return self._buffer(key, tensor).copy_(tensor.detach())

    def _copy_later(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() < _SMALL:
            return self._copy(key, tensor)
        self.copies.append((self._buffer(key, tensor), tensor.detach()))
        return self.copies[-1][0]

    def _buffer(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pin = tensor.device.type == "cuda"
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        return buffer

    # --- coming back ---

    def load(self, cell: Execute) -> dict[str, Any]:
        """What was saved for this rank; a rank that the saved world did not have begins with the first one's."""
        folder = Path(cell.resume["folder"])
        own_file, first_file = folder / f"rank-{self.rank:04d}.pt", folder / f"rank-{cell.ranks[0]:04d}.pt"
        is_new = not own_file.exists()
        saved: dict[str, Any] = writer.read(first_file if is_new else own_file)
        saved["is_new"] = is_new
        saved["shared"] = writer.read(folder / "shared.pt")
        return saved

    def restore(self, saved: dict[str, Any]) -> None:
        """The cell is at the saved place."""
        frames = frame_variables.user_frames(self._namespace)
        if frame_variables.names_of(frames) != saved["frames"]:
            raise ResumeMissed("the saved place was in other functions than the cell is in now.")
        accelerators = self._accelerators_of(saved["accelerators"])
        scope, graph, table = self._look(frames, Identities())
        self._cell_objects.remember(graph, self._trained_memory())  # the cell as it begins, not as it goes on
        table |= stateful_objects.of_accelerators(accelerators)
        folder = Path(self.cell.resume["folder"])
        shared = {address: writer.with_tensors(state, folder) for address, state in saved["shared"].items()}
        # Another world has other settings (a batch per rank, say): there only what the training has changed goes on.
        same_world = saved["world_size"] == len(self.cell.ranks)
        objects = saved["objects"] if same_world else self._cut_anew(saved["objects"], folder)
        stateful_objects.put({**shared, **objects}, table)
        if saved["gradients"] and saved["is_between_steps"] and not same_world:
            raise ResumeMissed(
                f"it was saved between two steps, with gradients of {saved['world_size']} ranks: resume it on as many."
            )
        stateful_objects.put_gradients(saved["gradients"], table)
        # By --resume, in attempt 0, the cell may have been edited, too.
        self._cell_objects.put(saved["graph"], graph, scope, same_world, bool(self.cell.attempt))
        for name, accelerator in accelerators.items():
            accelerator.step, sync_gradients = saved["accelerators"][name]
            accelerator.gradient_state._set_sync_gradients(sync_gradients)
        if saved["is_new"]:
            rng.restore_for_new_rank(saved["rng"], self.rank)
        else:
            rng.restore(saved["rng"])

    def _cut_anew(self, objects: dict[str, Any], folder: Path) -> dict[str, Any]:
        """What the ranks of another world have saved, for this one."""
        for state in objects.values():
            if reason := state.get("fixed_size"):
                raise ResumeMissed(reason)
        spread = [address for address, state in objects.items() if sharded_tensors.holds_shards(state["state"])]
        if not spread:
            return objects
        files = sorted(folder.glob("rank-*.pt"))
        every = [writer.read(path)["objects"] for path in files]
        return {**objects, **{address: sharded_tensors.merge([one[address] for one in every]) for address in spread}}

    def went_on(self) -> None:
        """A pass that was under way beside the saved place is drawn from again."""
        self._cell_objects.went_on(frame_variables.user_frames(self._namespace))
