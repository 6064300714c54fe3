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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.training.checkpoint import writer
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.group.stop_barrier import Steps
from jupyter_llmcloud.training.output.sender import OutputSender
from jupyter_llmcloud.training.resume import hooks, loop_tracking
from jupyter_llmcloud.training.resume.cell_state import CellState
from jupyter_llmcloud.training.resume.dataloader_tracking import ReplayPosition, StepCount
from jupyter_llmcloud.training.resume.replay import ReplayCursor

_PATIENCE_S = 30.0  # the first rank may be writing a model of its own
_MAX_LATE = 3  # checkpoints in a row, after which no more are tried
_LOOK_S = 0.1
_OLD_WORKERS = (
    "The workers of a loader with persistent_workers=True keep random numbers of their own, which no checkpoint holds: "
    "where the data set draws some, they differ from here on. Without persistent_workers they are the same.\n"
)
_NOT_FOLLOWED = (
    "No checkpoint is saved: the steps are taken in no loop that is followed. `for` and `while` loops of a cell, or of "
    "a module of yours, are; so is `for step in run.steps(total)`; or call run.checkpoint() after a step.\n"
)
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

    def __init__(self, outlet: OutputSender, steps: Steps, store: Callable[[], Any], rank: int) -> None:
        self.outlet = outlet
        self.steps = steps
        self._store = store  # the one by which the ranks meet now
        self.place = ReplayCursor(self)
        self.state = CellState(self.place, rank)
        self.rank = rank
        self.cell: Execute | None = None
        self.follows = False  # whether the present cell can be resumed
        self.replaying = False  # it has not come to its resume point yet
        self.resumed_step = 0
        self._writer: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._clear()

    def install(self) -> None:
        """Look at optimizers, loaders and loops from now on. Called once, in a rank."""
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)
        hooks.number_loaders(self.place)
        loop_tracking.install(self.place)

    def _clear(self) -> None:
        self.state.clear()
        self._losses: dict[str, float] = {}  # the last value of each metric that is called a loss
        self._refused = self._has_said = False
        self._serial = self._num_late = 0
        self._saved: dict[str, Any] | None = None
        self._wanted: Wanted | None = None
        self._unforeseen = False  # a checkpoint has come that was not expected
        self._save_at = -1  # steps, as the agent asks for one
        self._most_steps = 1  # between two batches
        self._steps_before = 0

    # --- the cell ---

    def begin(self, cell: Execute, namespace: dict[str, Any], given: set[str]) -> None:
        """A new cell; with `cell.resume` it is led back to a checkpoint."""
        self._wait()
        self._clear()
        self.cell = cell
        self.state.begin(cell, namespace, given)
        self._asks = bool(_ASKS.search(cell.code))
        self.resumed_step = 0
        self.follows = bool(cell.checkpoint_every or cell.max_restarts or self._asks or cell.resume)
        if self.follows and (problem := hooks.why_not()):
            self._cannot_track(cell, problem)
        self.replaying = bool(cell.resume)
        self._saved = self.state.load(cell) if cell.resume else None
        if self.follows:
            self.state.begin_following(self._saved)
        self.place.begin_cell(self.follows, self._saved["position"] if self._saved else None, cell.filename)
        self.outlet.muted = self.replaying

    def _cannot_track(self, cell: Execute, problem: str) -> None:
        if cell.resume:
            raise ResumeMissed(problem)
        self.follows = False
        self.outlet.warning("stderr", problem + "\n")

    def end(self, error: BaseException | None) -> None:
        """The cell has ended. Raises ResumeMissed when it should have been resumed on the way."""
        self.outlet.muted = False
        if error is None and self.follows:
            self.place.end_cell()
            if self._wanted is not None and self._wanted.waits:
                self.save({"kind": "end"})
            self._wait()

    def close(self) -> None:
        """Let go of the cell, however it has ended."""
        self.outlet.muted = self.follows = self.place.follows = self.place.replaying = False
        self.place.trainings.clear(None)
        self._clear()

    def note_accelerator(self, accelerator: Any) -> None:
        """An Accelerator was made."""
        self.state.note_accelerator(accelerator)

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
        self.state.note_step(optimizer)
        self.place.note_step()
        if self._is_asked_for and not self.place.replaying:
            self._save_at = -1
            self._wanted = Wanted(waits=True) if self.place.want_save() else None
            return
        every = self.cell.checkpoint_every
        if not every or self.steps.count % every or self.place.replaying:
            return
        if self._wanted is None or not self._wanted.waits:  # one may wait for a turn that was left by `break`
            self._wanted = Wanted() if self.place.want_save() else None
            if self._wanted is None and not self._has_said:
                self._has_said = True
                self.outlet.warning("stderr", _NOT_FOLLOWED)

    @property
    def _is_asked_for(self) -> bool:
        return 0 <= self._save_at <= self.steps.count

    def save_at(self, step: int) -> None:
        """The agent asks for a checkpoint when this many steps are finished; called in the side thread. -1: not."""
        self._save_at = step
        self._unforeseen = self._unforeseen or step >= 0

    def is_soon(self) -> bool:
        """Whether a checkpoint may be saved before the next batch but one; asked once a batch."""
        every = self.cell.checkpoint_every if self.cell else 0
        if self._asks or self._unforeseen or not every:
            return self._asks or self._unforeseen
        self._most_steps = max(self._most_steps, self.steps.count - self._steps_before)
        self._steps_before = self.steps.count
        return self.steps.count % every + 2 * self._most_steps >= every

    def ask(self, objects: dict[str, Any], metric: float | None, mode: str) -> None:
        """`run.checkpoint(...)`: at the end of the present turn of the loop, or now when there is no loop."""
        if self.cell is None or not self.follows or self.place.replaying:
            return
        self.state.objects.update(objects)
        self.state.check(objects)  # what cannot be saved is refused here, where it was asked for
        self._wanted = Wanted(True, metric, mode)
        if not self.place.want_save():
            self.save({"kind": "end"})

    # --- saving ---

    def save(self, position: ReplayPosition, complete: bool = True) -> bool:
        """Save what was wanted. When the place is not `complete`, one that was asked for is saved a turn later."""
        assert self.cell is not None
        wanted = self._wanted
        self._unforeseen = self._unforeseen or not complete
        if wanted is not None and wanted.waits and not complete:
            return False
        self._wanted = None
        if wanted is not None and not self._refused:
            self._save_part(wanted, position, complete)
        return True

    def _save_part(self, wanted: Wanted, position: ReplayPosition, complete: bool) -> None:
        assert self.cell is not None
        self._serial += 1
        part = CheckpointPart(
            run_id=self.cell.run_id,
            step=self.steps.count,
            attempt=self.cell.attempt,
            serial=self._serial,
            metric=wanted.metric,
            mode=wanted.mode,
            resumable=position["kind"] != "end",
        )
        try:
            if not (wanted.waits or self._all_save(complete)) or not complete:
                return
            self._wait()
            write = self._write(part, position)
            self._num_late = 0
        except Exception as error:
            self._num_late += 1
            self._refused = not isinstance(error, TimeoutError) or self._num_late >= _MAX_LATE
            self.state.copies = []
            refusal = replace(part, error=f"{type(error).__name__}: {error}")
            write = lambda: refusal  # noqa: E731
        # Also a refusal leaves through a thread: an interrupt must not tear a frame on the rank's socket.
        work = (self.outlet, part, write)
        self._writer = threading.Thread(target=writer.report, args=work, name=_THREAD, daemon=True)
        self._writer.start()

    def _write(self, part: CheckpointPart, position: ReplayPosition) -> Callable[[], CheckpointPart]:
        shared, own = self.state.take(position, self.steps.count)
        bad_loss = next((name for name, value in self._losses.items() if not math.isfinite(value)), "")
        name, staging = f"rank-{self.rank:04d}.pt", self._staging(part)
        copies, self.state.copies = self.state.copies, []
        self._copied.clear()
        changed = self.state.changed_while_written
        return writer.Write(part, name, staging, shared, own, bad_loss, copies, self._copied, changed).parts

    def _all_save(self, complete: bool) -> bool:
        """Whether a periodic checkpoint is saved or left out: the first rank says so, a part alone is of no use."""
        assert self.cell is not None
        store, key = self._store(), f"checkpoint/{self.cell.run_id}/{self.cell.attempt}/{self.steps.count}"
        if self._is_first:
            saves = complete and not self._is_writing
            store.set(key, str(saves))
            return saves
        deadline = time.monotonic() + _PATIENCE_S
        while not store.check([key]):
            if time.monotonic() > deadline:
                first = self.cell.ranks[0]
                raise TimeoutError(
                    f"rank {first} did not come to the end of step {self.steps.count} in {_PATIENCE_S:g} s. "
                    "Ranks that do not train in step can save by run.checkpoint() at places which all of them pass"
                )
            time.sleep(0.001)
        return bool(store.get(key) == b"True")

    @property
    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _staging(self, part: CheckpointPart) -> Callable[[], Path]:
        assert self.cell is not None
        folder = Path(self.cell.folder) / "checkpoints"
        return lambda: CheckpointFolder(folder).staging(part.step, part.attempt, part.serial)

    @property
    def _is_first(self) -> bool:
        return self.cell is not None and self.rank == self.cell.ranks[0]

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    # --- what the cursor asks and tells ---

    def where(self) -> list[tuple[str, str]]:
        """Which functions of the cell run, and where in their code they are."""
        return self.state.where()

    def before_backward(self) -> None:
        """Gradients are about to be computed."""
        self.state.note_backward()

    def begun_pass(self) -> None:
        """A pass over a loader begins."""
        self.state.note_begin()

    def went_on(self) -> None:
        """A pass that was under way beside the saved place is drawn from again."""
        self.state.went_on()

    def restore(self) -> None:
        saved, self._saved = self._saved, None
        assert saved is not None
        self.state.restore(saved)
        self.steps.count = self.resumed_step = saved["steps"]
        self.replaying = self.outlet.muted = False
        if saved["position"]["persistent"] and self._is_first:
            self.outlet.text("stderr", _OLD_WORKERS)
