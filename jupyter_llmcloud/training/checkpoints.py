"""Checkpoints as a rank sees them: due at a step, taken at the end of the loop's turn, written by a thread.

Weights are copied while the cell waits; a thread copies the state of the optimizers, which nothing touches before the
next step, and writes it all. There is never more than one being written: a periodic checkpoint that comes due meanwhile
is left out, one that the cell asks for by `run.checkpoint` waits. The leading agent commits a checkpoint when every
rank has said that its part is written.
"""

from __future__ import annotations

import math
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from jupyter_llmcloud.core.messages import Execute
from jupyter_llmcloud.core.rank_messages import CheckpointPart
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.training import checkpoint_files, loops, randomness, resuming, saved_state
from jupyter_llmcloud.training.outlet import Outlet
from jupyter_llmcloud.training.passes import Position, ResumeMissed, StepCount
from jupyter_llmcloud.training.resuming import Place
from jupyter_llmcloud.training.steps import Steps

_PATIENCE_S = 5.0
_LOOK_S = 0.1
_SMALL = 4096  # elements: copied at once
_THREAD = "llmcloud-checkpoint"
_ASKS = re.compile(r"\brun\s*\.\s*(checkpoint|steps)\b")


@dataclass
class Wanted:
    """A checkpoint that is to be saved at the end of the present turn."""

    waits: bool = False  # for the one before to be written; else it is left out
    metric: float | None = None
    mode: str = "min"


class Checkpoints:
    """The checkpoints of the cell that a rank executes."""

    def __init__(self, outlet: Outlet, steps: Steps, store: Any, rank: int) -> None:
        self.outlet = outlet
        self.steps = steps
        self.store = store
        self.place = Place()
        self.rank = rank
        self.cell: Execute | None = None
        self.follows = False  # whether the present cell can be resumed
        self.replaying = False  # it has not come to its resume point yet
        self.resumed_step = 0
        self._writer: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._clear()
        self.place.save, self.place.restore = self._save, self._restore
        self.place.soon, self.place.went_on = self._is_soon, self._went_on

    def install(self) -> None:
        """Look at optimizers, loaders and loops from now on. Called once, in a rank."""
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)
        resuming.install(self.place)
        loops.install(self.place)

    def _clear(self) -> None:
        self._accelerators_made: list[weakref.ref[Any]] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._first_variables: dict[str, Any] | None = None
        self._losses: dict[str, float] = {}  # the last value of each metric that is called a loss
        self._namespace: dict[str, Any] = {}
        self._objects: dict[str, Any] = {}
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._refused = False
        self._suspended: dict[str, dict[str, Any]] = {}
        self._saved: dict[str, Any] | None = None
        self._wanted: Wanted | None = None

    # --- the cell ---

    def begin(self, cell: Execute, namespace: dict[str, Any], given: set[str]) -> bool:
        """A new cell; with `cell.resume` it is led back to a checkpoint. Returns whether its loops are followed."""
        self._wait()
        self._clear()
        self.cell = cell
        self._namespace = namespace
        self._given = given
        self._asks = bool(_ASKS.search(cell.code))
        self.resumed_step = 0
        self.follows = bool(cell.checkpoint_every or cell.max_restarts or self._asks or cell.resume)
        self.replaying = bool(cell.resume)
        self._saved = self._load(cell) if cell.resume else None
        self.place.begin_cell(self.follows, self._saved["position"] if self._saved else None)
        self.outlet.muted = self.replaying
        return self.follows

    def end(self, error: BaseException | None) -> None:
        """The cell has ended. Raises ResumeMissed when it should have been resumed on the way."""
        self.outlet.muted = False
        if error is None and self.follows:
            self.place.end_cell()
            if self._wanted is not None and self._wanted.waits:
                self._save({"kind": "end"})
            self._wait()

    def close(self) -> None:
        """Let go of the cell, however it has ended."""
        self.outlet.muted = self.follows = self.place.follows = self.place.replaying = False
        self._clear()

    def note_accelerator(self, accelerator: Any) -> None:
        """An Accelerator was made."""
        self._accelerators_made.append(weakref.ref(accelerator))

    def note_metrics(self, values: Mapping[str, float]) -> None:
        """Metrics were logged."""
        self._losses.update((name, value) for name, value in values.items() if "loss" in name.lower())

    def count_steps(self, total: int) -> Iterator[int]:
        """`run.steps(total)`."""
        return StepCount(self.place, total) if self.place.follows else iter(range(total))

    # --- when ---

    def before_step(self, *_: Any) -> None:
        """An optimizer is about to step: what it changes must have been copied."""
        while not self._copied.wait(_LOOK_S):
            if not self._is_writing:
                self._copied.set()  # an interrupt came before the thread could begin

    def after_step(self, optimizer: Any, *_: Any) -> None:
        """An optimizer has stepped."""
        if not self.place.follows or threading.current_thread() is not threading.main_thread():
            return
        assert self.cell is not None
        self._optimizers.add(optimizer)
        self.place.note_step()
        if self._first_variables is None:
            self._first_variables = saved_state.variables(saved_state.user_frames(self._namespace), self._given)
        every = self.cell.checkpoint_every
        if every and self.steps.count % every == 0 and not self.place.replaying and self._wanted is None:
            self._wanted = Wanted() if self.place.want_save() else None

    def _is_soon(self) -> bool:
        every = self.cell.checkpoint_every if self.cell else 0
        return self._asks or bool(every and (self.steps.count + 1) % every == 0)

    def ask(self, objects: dict[str, Any], metric: float | None, mode: str) -> None:
        """`run.checkpoint(...)`: at the end of the present turn of the loop, or now when there is no loop."""
        if self.cell is None or not self.follows or self.place.replaying:
            return
        self._objects.update(objects)
        table = saved_state.addresses(saved_state.user_frames(self._namespace), self._accelerators())
        saved_state.find(table, (), objects)  # what cannot be saved is refused here, where it was asked for
        self._wanted = Wanted(True, metric, mode)
        if not self.place.want_save():
            self._save({"kind": "end"})

    # --- saving ---

    def _save(self, position: Position) -> None:
        wanted, self._wanted = self._wanted, None
        assert self.cell is not None
        if wanted is None or self._refused:
            return
        part = CheckpointPart(
            run_id=self.cell.run_id,
            step=self.steps.count,
            attempt=self.cell.attempt,
            metric=wanted.metric,
            mode=wanted.mode,
            resumable=position["kind"] != "end",
        )
        try:
            if not (wanted.waits or self._all_save()):
                return
            self._wait()
            write = self._write(part, position)
        except Exception as error:
            self._refused = True
            self._copies = []
            refusal = checkpoint_files.changed(part, error=f"{type(error).__name__}: {error}")
            write = lambda: refusal  # noqa: E731
        # Also a refusal leaves through a thread: an interrupt must not tear a frame on the rank's socket.
        work = (self.outlet, part, write)
        self._writer = threading.Thread(target=checkpoint_files.report, args=work, name=_THREAD, daemon=True)
        self._writer.start()

    def _write(self, part: CheckpointPart, position: Position) -> Callable[[], CheckpointPart]:
        shared, own = self._take(position)
        bad_loss = next((name for name, value in self._losses.items() if not math.isfinite(value)), "")
        name, aside = f"rank-{self.rank:04d}.pt", self._aside(part.step)
        copies, self._copies = self._copies, []
        self._copied.clear()
        return checkpoint_files.Write(part, name, aside, shared, own, bad_loss, copies, self._copied).parts

    def _all_save(self) -> bool:
        """Whether a periodic checkpoint is saved or left out: the first rank says so, a part alone is of no use."""
        assert self.cell is not None
        key = f"checkpoint/{self.cell.run_id}/{self.cell.attempt}/{self.steps.count}"
        if self._is_first:
            saves = not self._is_writing
            self.store.set(key, str(saves))
            return saves
        deadline = time.monotonic() + _PATIENCE_S
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                first = self.cell.ranks[0]
                raise TimeoutError(
                    f"rank {first} did not come to the end of step {self.steps.count} in {_PATIENCE_S:g} s. "
                    "Ranks that do not train in step can save by run.checkpoint() at places which all of them pass"
                )
            time.sleep(0.001)
        return bool(self.store.get(key) == b"True")

    @property
    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _aside(self, step: int) -> Callable[[], Path]:
        assert self.cell is not None
        folder, attempt = Path(self.cell.folder) / "checkpoints", self.cell.attempt
        return lambda: CheckpointFolder(folder).aside(step, attempt)

    def _take(self, position: Position) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        if saved_state.trainer_runs():
            raise RuntimeError(
                "transformers' Trainer keeps its own state: set save_strategy and resume_from_checkpoint; "
                "after a restart the cell runs from its start"
            )
        assert self.cell is not None
        alone = len(self.cell.ranks) == 1
        frames = saved_state.user_frames(self._namespace)
        iterators = [*saved_state.used_values(frames), *(loop.source for loop in self.place.loops.nest())]
        if any(map(saved_state.keeps_batches, iterators)):
            raise RuntimeError(
                "itertools.cycle repeats the batches of its first pass, which are not saved; write "
                "`while True: yield from loader` instead. After a restart the cell runs from its start"
            )
        accelerators = self._accelerators()
        found = saved_state.find(
            saved_state.addresses(frames, accelerators), list(self._optimizers), self._objects, alone
        )
        variables = saved_state.variables(frames, self._given)
        own = {
            "position": position,
            "rng": randomness.snapshot(),
            "frames": saved_state.names_of(frames),
            "variables": variables,
            "changed": saved_state.changed(variables, self._first_variables or {}),
            "suspended": saved_state.suspended(frames, self._given),
            "steps": self.steps.count,
            "world_size": len(self.cell.ranks),
            "accelerators": {
                name: (item.step, item.gradient_state.sync_gradients) for name, item in accelerators.items()
            },
            "objects": saved_state.take(found, False, self._copy, self._copy_later),
        }
        if not self._is_first:
            return None, own
        return saved_state.take(found, True, self._copy, self._copy_later), own

    @property
    def _is_first(self) -> bool:
        return self.cell is not None and self.rank == self.cell.ranks[0]

    def _accelerators(self) -> dict[str, Any]:
        """The Accelerators of the cell by name: those it has made, else those of earlier cells that it trains with."""
        made = [item for ref in self._accelerators_made if (item := ref()) is not None]
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
        self._copies.append((self._buffer(key, tensor), tensor.detach()))
        return self._copies[-1][0]

    def _buffer(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pin = tensor.device.type == "cuda"
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        return buffer

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    # --- coming back ---

    def _load(self, cell: Execute) -> dict[str, Any]:
        folder = Path(cell.resume["folder"])
        own_file, first_file = folder / f"rank-{self.rank:04d}.pt", folder / f"rank-{cell.ranks[0]:04d}.pt"
        is_new = not own_file.exists()
        saved: dict[str, Any] = checkpoint_files.read(first_file if is_new else own_file)
        saved["is_new"] = is_new
        saved["shared"] = checkpoint_files.read(folder / "shared.pt")
        return saved

    def _restore(self) -> None:
        saved, cell = self._saved, self.cell
        assert saved is not None and cell is not None
        self._saved = None
        frames = saved_state.user_frames(self._namespace)
        if saved_state.names_of(frames) != saved["frames"]:
            raise ResumeMissed("the saved place was in other functions than the cell is in now.")
        accelerators = self._accelerators_of(saved["accelerators"])
        table = saved_state.addresses(frames, accelerators)
        folder = Path(cell.resume["folder"])
        shared = {address: checkpoint_files.with_tensors(state, folder) for address, state in saved["shared"].items()}
        saved_state.put({**shared, **saved["objects"]}, table)
        # Another world has other settings (a batch per rank, say): there only what the training has changed goes on.
        same_world = saved["world_size"] == len(cell.ranks)
        wanted = saved["variables"] if same_world else {name: saved["variables"][name] for name in saved["changed"]}
        saved_state.set_variables(frames, wanted)
        self._suspended = saved["suspended"] if same_world else {}
        for name, accelerator in accelerators.items():
            accelerator.step, sync_gradients = saved["accelerators"][name]
            accelerator.gradient_state._set_sync_gradients(sync_gradients)
        self.steps.count = self.resumed_step = saved["steps"]
        self.replaying = self.outlet.muted = False
        if saved["is_new"]:
            randomness.restore_for_new_rank(saved["rng"], self.rank)
        else:
            randomness.restore(saved["rng"])

    def _went_on(self) -> None:
        if self._suspended:
            saved_state.resume_suspended(saved_state.user_frames(self._namespace), self._suspended)
