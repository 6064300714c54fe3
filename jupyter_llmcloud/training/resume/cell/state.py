"""What a checkpoint holds of a rank's cell: taken at the saved position, put back when the cell is there again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.checkpoint import replica_digests, rng, sharded_tensors, stateful_objects, writer
from jupyter_llmcloud.training.checkpoint.borrower import Borrower
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.stager import Stager
from jupyter_llmcloud.training.object_graph.graph import Graph, Identities
from jupyter_llmcloud.training.object_graph.kinds.iterators import FOLLOWED
from jupyter_llmcloud.training.object_graph.rewrap import rewrapped
from jupyter_llmcloud.training.parallel.fully_sharded import settle
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.resume.cell import frame_variables
from jupyter_llmcloud.training.resume.cell.context import CellContext, by_first_names
from jupyter_llmcloud.training.resume.cell.objects import CellObjects, Scope
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition

_LOOK_SHARE = 0.05  # of the time of a cell: more is not looked at loops of which each may be the one that trains


class LoopLooks:
    """How long was looked at how a cell is where loops begin. A context: that is done within it."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._took_s = 0.0

    @property
    def may_be_more(self) -> bool:
        """Whether what was done is a small part of the time of the cell."""
        return self._took_s <= _LOOK_SHARE * (time.monotonic() - self._began)

    def __enter__(self) -> None:
        self._last = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._took_s += time.monotonic() - self._last


class CellState:
    """The state of the cell that a rank executes.

    Attributes:
        rank: of this process.
        cell: that is executed.
        objects: what was handed to `run.checkpoint`.
        digests: of what replicas must hold alike, as it was taken last; fields of CheckpointPart.
    """

    def __init__(self, context: CellContext, rank: int) -> None:
        self.rank = rank
        self._context = context
        self._optimizers = context.optimizers
        self._cell_objects = CellObjects()
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        self._context.clear()
        self._cell_objects.clear()
        self.objects: dict[str, Any] = {}
        self._cannot: Exception | None = None
        self._trains = False
        self._looks = LoopLooks()
        self.digests: dict[str, dict[str, str]] = {}
        self._rng_at_begin: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}

    def begin(self, cell: Execute, namespace: dict[str, Any], given: set[str]) -> None:
        """The cell begins; `given` are names that every namespace starts with."""
        self.cell = cell
        self._context.begin(cell.run_id, namespace, given)

    def begin_following(self, saved: dict[str, Any] | None) -> None:
        """The cell is followed. One that is executed again draws the same random numbers from its start."""
        if saved is not None and not saved["is_new"]:
            rng.restore(saved["rng_at_begin"])
        self._rng_at_begin = rng.snapshot()

    @property
    def is_first(self) -> bool:
        """Whether this rank saves what is alike on all."""
        return self.rank == self.cell.ranks[0]

    def write_serving_files(self) -> str:
        """Write beside the checkpoints what is needed to serve them; returns what went wrong. Once a run is enough."""
        if not self.is_first or not self.cell.save:
            return ""
        try:
            self._context.write_serving_files(self.cell.save, Path(self.cell.folder))
        except Exception as error:  # of a tokenizer or a configuration of somebody's: the training goes on
            return f"{type(error).__name__}: {error}"
        return ""

    # --- as it goes on ---

    def note_accelerator(self, accelerator: Any) -> None:
        """An Accelerator was made."""
        self._context.note_accelerator(accelerator)

    def prepared(self) -> list[Any]:
        """Weak references to the cell's Accelerators and what they have prepared."""
        return self._context.prepared()

    def note_loop(self) -> None:
        """A loop begins with none round it: when it trains, this is how the cell is when it is executed again."""
        if self._trains:
            return
        self._cell_objects.forget()
        if not self._looks.may_be_more:
            return  # one of many
        with self._looks:
            try:
                self._remember()
                self._cell_objects.note_loop(self._context.frames())
            except Exception:
                self._cell_objects.forget()  # when the training begins, it is told

    def note_begin(self) -> None:
        """A pass over data begins, or a first step: what is new is remembered as it is now."""
        try:
            self._remember()
            if not self._trains:
                self._cell_objects.remember_bodies(self._context.same_bodies())
        except Exception as error:  # the training must not end by what it is looked at with
            self._cannot = error
        self._trains = True

    def _remember(self) -> None:
        graph = self._cell_objects.graph(self._context.scope(self._context.frames()))
        self._cell_objects.remember(graph, self._context.trained_memory())

    def note_step(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self._optimizers.note_step(optimizer)
        if not self._trains:
            self.note_begin()

    def note_backward(self) -> None:
        """Gradients are about to be computed."""
        self._optimizers.note_backward()

    def note_batch(self) -> None:
        """A loader has delivered."""
        self._optimizers.note_batch()

    def where(self) -> list[tuple[str, str]]:
        """Which functions run, and which of their instructions."""
        return frame_variables.instructions_of(self._context.frames())

    def check(self, objects: dict[str, Any]) -> None:
        """Raise when one of these objects cannot be part of a checkpoint."""
        stateful_objects.find(self._look(self._context.frames())[2], (), objects)

    def _look(self, frames: list[Any], known: Identities | None = None) -> tuple[Scope, Graph, dict[str, Any]]:
        """Where the cell is, its objects, and those of them that have a state of their own by address."""
        scope, graph, table = self._look_once(frames, known)
        if any([settle(value) for value in table.values()]):  # their tensors are other ones now
            scope, graph, table = self._look_once(frames, known)
        return scope, graph, table

    def _look_once(self, frames: list[Any], known: Identities | None) -> tuple[Scope, Graph, dict[str, Any]]:
        scope = self._context.scope(frames)
        graph = self._cell_objects.graph(scope, known)
        return scope, graph, self._context.with_state(graph)

    # --- taking ---

    def take(
        self, position: ReplayPosition, num_steps: int, stager: Stager
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What the first rank saves for all (None elsewhere), and what this rank saves of its own.

        Tensors are copied by `stager`; those that it copies later must be copied before the next step. For one that
        borrows them every rank takes what is alike on all: who writes it is not known yet.
        """
        if self._cannot is not None:
            raise self._cannot
        context, frames = self._context, self._context.frames()
        context.refuse_what_is_not_followed(frames, position)
        alone = len(self.cell.ranks) == 1
        scope, graph, table = self._look(frames)
        table = by_first_names(table, graph)
        found = stateful_objects.find(table, context.optimizers_in(table), self.objects, alone)
        graph.leave(
            [inner for item in found if not item.is_module for inner in stateful_objects.layers(item.value)], FOLLOWED
        )
        covered = context.trained_memory() | stateful_objects.memory_of(found, self.is_first)
        limit = sum(p.nbytes for item in found if item.is_module for p in item.value.parameters())
        trained = {id(p) for item in found if item.is_optimizer for p in stateful_objects.parameters_of(item.value)}
        if borrows := isinstance(stager, Borrower):
            stager.begin(stateful_objects.whole_memory_of(found))
        self.digests = {} if alone or borrows else _digests(found)
        own = {
            "position": rng.loadable(position),
            "rng": rng.loadable(rng.snapshot()),
            "rng_at_begin": rng.loadable(self._rng_at_begin),
            "frames": frame_variables.names_of(frames),
            "graph": self._cell_objects.take(scope, graph, covered, trained, stager.copy, limit),
            "steps": num_steps,
            "world_size": len(self.cell.ranks),
            "accelerators": {name: stateful_objects.settings_of(item) for name, item in context.accelerators().items()},
            "gradients": stateful_objects.gradients(
                [item for item in found if self._may_have_gradients(item.value)], stager.copy
            ),
            "is_between_steps": self._optimizers.is_between_steps,
            "plan": ACTIVE.state(stager.copy, {item.address: item.value for item in found if item.is_module}),
            "objects": stateful_objects.take(found, False, stager.copy, stager.copy_later),
        }
        if not (self.is_first or borrows):
            return None, own
        return stateful_objects.take(found, True, stager.copy, stager.copy_later), own

    def _may_have_gradients(self, value: Any) -> bool:
        optimizer = stateful_objects.inner_optimizer(value)
        return optimizer is not None and self._optimizers.may_have_gradients(optimizer)

    def changed_while_written(self) -> list[str]:
        """Memory that was too large to be compared at once and has changed: the next checkpoint holds it."""
        return self._cell_objects.changed_while_written()

    # --- coming back ---

    def load(self, folder: Path) -> dict[str, Any]:
        """What was saved for this rank; a rank that the saved world did not have begins with the first one's."""
        own_file, first_file = folder / f"rank-{self.rank:04d}.pt", folder / f"rank-{self.cell.ranks[0]:04d}.pt"
        is_new = not own_file.exists()
        saved: dict[str, Any] = writer.read(first_file if is_new else own_file)
        saved["is_new"] = is_new
        saved["shared"] = writer.read(folder / "shared.pt")
        self._saved = saved
        return saved

    def restore(self) -> dict[str, Any]:
        """The cell is at the saved position: put back what was loaded, and let go of it. Returns it."""
        saved, self._saved = self._saved, {}
        frames = self._context.frames()
        if frame_variables.names_of(frames) != saved["frames"]:
            raise ResumeMissed("the saved place was in other functions than the cell is in now.")
        accelerators = self._context.accelerators_named(saved["accelerators"])
        scope, graph, table = self._look(frames, Identities())
        # The cell as it begins, not as it goes on.
        self._cell_objects.remember(graph, self._context.trained_memory())
        if not self._trains:
            self._cell_objects.remember_bodies(self._context.same_bodies())
        self._trains = True
        table |= stateful_objects.of_accelerators(accelerators)
        folder = Path(self.cell.resume["folder"])
        shared = {address: writer.with_tensors(state, folder) for address, state in saved["shared"].items()}
        # Another world has other settings (a batch per rank, say): there only what the training has changed goes on.
        same_world = saved["world_size"] == len(self.cell.ranks)
        how = ACTIVE.how_to_load(saved.get("plan"), same_world)
        objects = self._objects(saved["objects"], how, folder)
        same_world = same_world and how == "own"
        stateful_objects.put({**shared, **objects}, table)
        if saved["gradients"] and saved["is_between_steps"] and not same_world:
            raise ResumeMissed(
                f"it was saved between two steps, with gradients of {saved['world_size']} ranks: resume it on as many."
            )
        stateful_objects.put_gradients(saved["gradients"], table)
        ACTIVE.put(saved.get("plan"), how, stateful_objects.modules(table))
        # By --resume, in attempt 0, the cell may have been edited, too.
        kept = saved["graph"] if how == "own" else rewrapped(saved["graph"], graph)
        self._cell_objects.put(kept, graph, scope, same_world, bool(self.cell.attempt))
        for name, accelerator in accelerators.items():
            stateful_objects.put_settings(accelerator, saved["accelerators"][name], bool(self.cell.attempt))
        if saved["is_new"]:
            rng.restore_for_new_rank(saved["rng"], self.rank)
        else:
            rng.restore(saved["rng"])
        if not same_world:
            ACTIVE.draw_alike()
        return saved

    def _objects(self, own: dict[str, Any], how: str, folder: Path) -> dict[str, Any]:
        if how == "own":
            return own
        if how == "first":
            first: dict[str, Any] = writer.read(min(folder.glob("rank-*.pt")))["objects"]
            return first
        return self._cut_anew(own, folder)

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
        """A pass that was under way beside the saved position is drawn from again."""
        self._cell_objects.went_on(self._context.frames())


def _digests(found: list[stateful_objects.StatefulObject]) -> dict[str, dict[str, str]]:
    parameters, buffers = replica_digests.of_models([item.value for item in found if item.is_module])
    return {"parameters": parameters, "buffers": buffers, "rng": replica_digests.of_rng()}
