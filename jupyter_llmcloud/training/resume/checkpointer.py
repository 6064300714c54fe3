"""Checkpoints as a rank sees them: due at a step, taken at the end of the loop's iteration, written by a thread.

Weights are copied while the cell waits; a thread copies the state of the optimizers, which nothing touches before the
next step, and writes it all. There is never more than one being written: a periodic checkpoint that comes due meanwhile
is left out, one that the cell asks for by `run.checkpoint` waits. The leading agent commits a checkpoint when every
rank has said that its part is written.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.training.checkpoint.background_writer import BackgroundWriter
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.writer import Write
from jupyter_llmcloud.training.diagnostics.time_split import BLOCKED, CHECKPOINT, TIMES
from jupyter_llmcloud.training.group.stop_barrier import Steps
from jupyter_llmcloud.training.output.sender import OutputSender
from jupyter_llmcloud.training.resume import hooks
from jupyter_llmcloud.training.resume.cell.context import CellContext
from jupyter_llmcloud.training.resume.cell.state import CellState
from jupyter_llmcloud.training.resume.last_state import LastState
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition
from jupyter_llmcloud.training.resume.loops import tracking
from jupyter_llmcloud.training.resume.replay import ReplayCursor
from jupyter_llmcloud.training.resume.schedule import CheckpointSchedule, SaveRequest

_PATIENCE_S = 30.0  # the first rank may be writing a model of its own
# For a checkpoint that is being written when the cell fails, or is interrupted: whoever has pressed Stop waits for it.
_AT_FAILURE_S, _AT_STOP_S = 30.0, 1.0
_OLD_WORKERS = (
    "The workers of a loader with persistent_workers=True keep random numbers of their own, which no checkpoint holds: "
    "where the data set draws some, they differ from here on. Without persistent_workers they are the same.\n"
)
_NOT_FOLLOWED = (
    "No checkpoint is saved: the steps are taken in no loop that is followed. `for` and `while` loops of a cell, or of "
    "a module of yours, are; so is `for step in run.steps(total)`; or call run.checkpoint() after a step.\n"
)
_APPENDED = (
    "The cell opens a file to append to it: what it has written there after step {step} stays, and is written again.\n"
)
_APPENDS = re.compile(r"""\bopen\(.*,\s*["']a[bt+]*["']|\.open\(\s*["']a[bt+]*["']|\bmode\s*=\s*["']a[bt+]*["']""")
_LAST_STATE_S = 4.0  # at most, until it is written
_HELD = SaveRequest(is_held=True)
_ASKS = re.compile(r"\brun\s*\.\s*(checkpoint|steps)\b")


class Checkpointer:
    """The checkpoints of the cell that a rank executes.

    Args:
        store: gives the store by which the ranks meet now.
        rank: of this process.
    """

    def __init__(self, sender: OutputSender, steps: Steps, store: Callable[[], Any], rank: int) -> None:
        self._sender = sender
        self._steps = steps
        self._store = store
        self.cursor = ReplayCursor(self)
        context = CellContext(self.cursor.loops, self.cursor.trainings, self.cursor.loaders)
        self._state = CellState(context, rank)
        self._last = LastState(self._state)
        self._writer = BackgroundWriter(sender)
        self.cell: Execute | None = None
        self._resumed_step: int | None = 0  # None: the cell has not come to its resume point yet
        self._clear(CheckpointSchedule())

    def install(self) -> None:
        """Look at optimizers, loaders and loops from now on. Called once, in a rank."""
        register_optimizer_step_pre_hook(self._writer.before_step)
        register_optimizer_step_pre_hook(self._last.drop)
        register_optimizer_step_post_hook(self.after_step)
        hooks.number_loaders(self.cursor)
        tracking.install(self.cursor, self.cursor.loops)

    def _clear(self, schedule: CheckpointSchedule) -> None:
        self._schedule = schedule
        self._state.clear()
        self._writer.clear()
        self._losses: dict[str, float] = {}  # the last value of each metric that is called a loss
        self._wanted: SaveRequest | None = None
        self._last.clear()

    def renumber(self, rank: int) -> None:
        """This process has another number among the ranks from now on."""
        self._state.rank = rank

    @property
    def follows(self) -> bool:
        """Whether the present cell can be resumed."""
        return self.cursor.follows

    @property
    def replaying(self) -> bool:
        """Whether the cell has not come, or did not come, to its resume point."""
        return self._resumed_step is None

    @property
    def resumed_step(self) -> int:
        """The optimizer step from which the cell was resumed; 0 when it was not."""
        return self._resumed_step or 0

    # --- the cell ---

    def begin(self, cell: Execute, namespace: dict[str, Any], given: set[str]) -> None:
        """A new cell; with `cell.resume` it is led back to a checkpoint."""
        self._writer.wait()
        asks = bool(_ASKS.search(cell.code))
        asked_at = self._schedule.asked_at  # by the agent, before this thread has come to the cell
        self._schedule = CheckpointSchedule(cell.checkpoint_every, asks)
        self._schedule.ask_at(asked_at)
        self.cell = cell
        self._state.begin(cell, namespace, given)
        self._resumed_step = 0
        follows = bool(cell.checkpoint_every or cell.max_restarts or asks or cell.resume)
        if follows and (problem := hooks.why_not()):
            if cell.resume:
                raise ResumeMissed(problem)
            self._sender.warning("stderr", problem + "\n")
            follows = False
        saved = None
        if cell.resume:
            self._resumed_step = None
            saved = self._state.load(Path(cell.resume["folder"]))
        if follows:
            self._state.begin_following(saved)
            self._last.begin(cell)
        self.cursor.begin_cell(follows, saved["position"] if saved else None, cell.filename)
        self._sender.muted = self.replaying

    def end(self, error: BaseException | None, is_echo: bool = False) -> None:
        """The cell has ended. Raises ResumeMissed when it should have been resumed on the way.

        `is_echo`: its error came of the end of a peer.
        """
        self._sender.muted = False
        if error is None and self.follows:
            self.cursor.end_cell()
            if self._wanted is not None and self._wanted.waits:
                self.save({"kind": "end"})
            with TIMES.within(CHECKPOINT):
                self._writer.wait()
        elif error is not None:  # what it has saved is what it goes on from: the agent forgets what comes later
            self._write_last_state(is_echo)
            self._writer.wait(_AT_FAILURE_S if isinstance(error, Exception) else _AT_STOP_S)

    def close(self) -> None:
        """Let go of the cell, however it has ended."""
        self._sender.muted = False
        self.cursor.close()
        self._clear(CheckpointSchedule())

    def note_accelerator(self, accelerator: Any) -> None:
        """An Accelerator was made."""
        self._state.note_accelerator(accelerator)

    def note_metrics(self, values: Mapping[str, float]) -> None:
        """Metrics were logged."""
        self._losses.update((name, value) for name, value in values.items() if "loss" in name.lower())

    def count_steps(self, total: int) -> Iterator[int]:
        """`run.steps(total)`."""
        return self.cursor.count_steps(total)

    # --- when ---

    def after_step(self, optimizer: Any, *_: Any) -> None:
        """An optimizer has stepped."""
        if not self.follows or threading.current_thread() is not threading.main_thread():
            return
        self._state.note_step(optimizer)
        self.cursor.note_step()
        if self.cursor.replaying:
            return
        is_held = self._last.is_due()
        if (request := self._schedule.due(self._steps.count)) is None and not is_held:
            return
        wanted = self._wanted
        if wanted is not None and not wanted.is_held and (request is None or (wanted.waits and not request.waits)):
            return  # one may wait for an iteration that was left by `break`
        self._wanted = (request or _HELD) if self.cursor.want_save() else None
        if self._wanted is None and request is not None and not request.waits and not self._schedule.has_warned:
            self._schedule.has_warned = True
            self._sender.warning("stderr", _NOT_FOLLOWED)

    def save_at(self, step: int) -> None:
        """The agent asks for a checkpoint when this many steps are finished; called in the side thread. -1: not."""
        self._schedule.ask_at(step)

    def tell_who_is_left(self, ranks: list[int]) -> None:
        """The agent says that the other ranks are lost with their agents; called in the side thread."""
        self._last.tell(ranks)

    def note_release(self) -> None:
        """The group is broken, whoever is left; called in the side thread."""
        self._last.note_release()

    def ask(self, objects: dict[str, Any], metric: float | None, mode: str) -> None:
        """`run.checkpoint(...)`: at the end of the present iteration of the loop, or now when there is no loop."""
        if not self.follows or self.cursor.replaying:
            return
        self._state.objects.update(objects)
        self._state.check(objects)  # what cannot be saved is refused here, where it was asked for
        self._wanted = SaveRequest(True, metric, mode)
        if not self.cursor.want_save():
            self.save({"kind": "end"})

    # --- saving ---

    def save(self, position: ReplayPosition, complete: bool = True) -> bool:
        """Save what was wanted. At one that is not `complete`, what was asked for is saved an iteration later."""
        wanted = self._wanted
        if wanted is not None and wanted.is_held:
            self._wanted = None
            if complete and not self._writer.is_busy:  # which may still compare what was taken for it
                self._last.take(position, self._steps.count)
            return True
        if not complete:
            self._schedule.note_late()
            if wanted is not None and wanted.waits:
                return False
        self._wanted = None
        # Where the first rank has given up, the others wait for its word all the same.
        if wanted is not None and (self._state.is_first or not self._writer.has_given_up):
            with TIMES.within(CHECKPOINT):
                self._save_part(wanted, position, complete)
        return True

    def _save_part(self, wanted: SaveRequest, position: ReplayPosition, complete: bool) -> None:
        assert self.cell is not None
        part = CheckpointPart(
            run_id=self.cell.run_id,
            step=self._steps.count,
            attempt=self.cell.attempt,
            serial=self._writer.next_serial(self._steps.count),
            metric=wanted.metric,
            mode=wanted.mode,
            resumable=position["kind"] != "end",
        )
        try:
            saves = wanted.waits or self._all_save(self.cell, complete)
            if not saves or not complete or self._writer.has_given_up:
                return
            self._writer.wait()
            if problem := self._state.write_serving_files():
                self._sender.warning("stderr", f"The checkpoints of this run cannot be served: {problem}\n")
            began = time.thread_time()
            write = self._taken(self.cell, part, position)
            write.part = replace(write.part, cpu_s=time.thread_time() - began)
        except Exception as error:
            self._writer.refuse(part, error)
        else:
            self._writer.write(part, write.parts)

    def _write_last_state(self, waits: bool) -> None:
        """Write what this rank holds of its last iteration, where peers are lost and the agent asks for that."""
        if waits:
            with contextlib.suppress(KeyboardInterrupt):  # which comes after it has told who is left
                self._last.wait()
        taken = self._last.of_those_left(self._steps.count, self._state.rank)
        if taken is None or self.cell is None:
            return
        cell, index = self.cell, taken.ranks.index(self._state.rank)
        part = CheckpointPart(run_id=cell.run_id, step=taken.step, attempt=cell.attempt, left=list(taken.ranks))
        shared = taken.shared if index == 0 else None
        write = self._write_of(cell, part, shared, taken.own, index, lambda: None)
        write.is_waited_for = True
        deadline = time.monotonic() + _LAST_STATE_S
        if self._is_written(deadline):  # what was under way
            self._writer.write(part, write.parts)
            self._is_written(deadline)

    def _is_written(self, deadline: float) -> bool:
        """Wait for what is being written; an interrupt has been obeyed already, since the cell has ended."""
        while self._writer.is_busy and (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(KeyboardInterrupt):
                self._writer.wait(left_s)
        return not self._writer.is_busy

    def _taken(self, cell: Execute, part: CheckpointPart, position: ReplayPosition) -> Write:
        stager = self._writer.stager
        shared, own = self._state.take(position, part.step, stager)
        part = replace(part, **self._state.digests)
        return self._write_of(cell, part, shared, own, self._state.rank, stager.hand_over())

    def _write_of(
        self,
        cell: Execute,
        part: CheckpointPart,
        shared: dict[str, Any] | None,
        own: dict[str, Any],
        rank: int,
        finish_copies: Callable[[], None],
    ) -> Write:
        folder = CheckpointFolder(Path(cell.folder) / "checkpoints")
        bad_loss = next((name for name, value in self._losses.items() if not math.isfinite(value)), "")
        return Write(
            part,
            name=f"rank-{rank:04d}.pt",
            staging=lambda: folder.staging(part.step, part.attempt, part.serial),
            shared=shared,
            own=own,
            bad_loss=bad_loss,
            finish_copies=finish_copies,
            changed=self._state.changed_while_written,
        )

    def _all_save(self, cell: Execute, complete: bool) -> bool:
        """Whether a periodic checkpoint is saved or left out: the first rank says so, a part alone is of no use."""
        store, key = self._store(), f"checkpoint/{cell.run_id}/{cell.attempt}/{self._steps.count}"
        if self._state.is_first:
            saves = complete and not (self._writer.is_busy or self._writer.has_given_up)
            store.set(key, str(saves))
            return saves
        with TIMES.within(BLOCKED):
            self._wait_for(store, key, cell.ranks[0])
        return bool(store.get(key) == b"True")

    def _wait_for(self, store: Any, key: str, first: int) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {first} did not come to the end of step {self._steps.count} in {_PATIENCE_S:g} s. "
                    "Ranks that do not train in step can save by run.checkpoint() at places which all of them pass"
                )
            time.sleep(0.001)

    # --- what the cursor asks and tells ---

    def is_soon(self) -> bool:
        """Whether a checkpoint may be saved before the next batch but one; asked once a batch."""
        return self._last.is_near or self._schedule.is_soon(self._steps.count)

    def where(self) -> list[tuple[str, str]]:
        """Which functions of the cell run, and where in their code they are."""
        return self._state.where()

    def before_backward(self) -> None:
        """Gradients are about to be computed."""
        self._state.note_backward()

    def after_batch(self) -> None:
        """A loader has delivered."""
        self._state.note_batch()

    def prepared(self) -> list[Any]:
        """Weak references to the cell's Accelerators and what they have prepared."""
        return self._state.prepared()

    def begun_loop(self) -> None:
        """A loop begins with none round it."""
        self._state.note_loop()

    def begun_pass(self) -> None:
        """A pass over a loader begins."""
        self._state.note_begin()

    def went_on(self) -> None:
        """A pass that was under way beside the saved position is drawn from again."""
        self._state.went_on()

    def restore(self) -> None:
        """The cell is at the saved position."""
        saved = self._state.restore()
        self._steps.count = self._resumed_step = saved["steps"]
        self._sender.muted = False
        if not self._state.is_first:
            return
        if saved["position"]["persistent"]:
            self._sender.text("stderr", _OLD_WORKERS)
        if self.cell is not None and _APPENDS.search(self.cell.code):
            self._sender.text("stderr", _APPENDED.format(step=saved["steps"]))
