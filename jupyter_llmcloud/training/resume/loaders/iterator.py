"""Passes over loaders: followed while a cell runs, and led back to where they were when it is executed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from accelerate.data_loader import DataLoaderShard

from jupyter_llmcloud.training.checkpoint import rng as randomness
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.data.rank_loader import RankLoader
from jupyter_llmcloud.training.resume.loaders import own_parts
from jupyter_llmcloud.training.resume.loaders.order import batch_size, num_rows, order_of, set_order
from jupyter_llmcloud.training.resume.loaders.source import LoaderSource

ReplayPosition = dict[str, Any]


class LoaderCursor(Protocol):
    """What a pass over a loader asks and tells the cursor that follows the cell."""

    @property
    def replaying(self) -> bool:
        """Whether the cell is on its way to the saved position."""

    def made(self, iterator: TrackedIterator) -> None:
        """Somebody has an iterator; its pass begins when it is drawn from."""

    def begin(self, iterator: TrackedIterator) -> None:
        """A pass begins: it is given its key and its ordinal."""

    def plan(self, iterator: TrackedIterator) -> tuple[str, int]:
        """What a pass that begins does: "run", "nothing", "forward", or "stand in" for so many batches."""

    def take_up(self, iterator: TrackedIterator) -> None:
        """A pass that has begun is drawn from again on the way to the saved position."""

    def saved_pass(self, key: str) -> ReplayPosition:
        """Where the pass over this loader was."""

    def went_on(self) -> None:
        """A pass that was under way beside the saved position is drawn from again."""

    def before_batch(self, iterator: TrackedIterator) -> None:
        """The loop comes for its next batch."""

    def after_batch(self, iterator: TrackedIterator) -> None:
        """The loop is given a batch."""

    def finished(self, iterator: TrackedIterator) -> None:
        """A pass has delivered its last batch."""


class TrackedIterator:
    """One pass over a loader.

    Attributes:
        key: the name of the loader in the cell.
        ordinal: how many passes over it began before.
        handed_out: batches delivered.
        start: what decided the order of its samples when it began.
        rng_of_last_call: the random numbers before its last batch was drawn; None where nobody may need them.
        forward_to: the saved pass as which it goes on when its next batch is asked for.
        ended: nothing more is drawn.
    """

    def __init__(self, cursor: LoaderCursor, source: LoaderSource) -> None:
        self._cursor = cursor
        self._source = source
        self.key = ""
        self.ordinal = -1
        self.handed_out = 0
        self.start: dict[str, Any] = {}
        self.rng_of_last_call: dict[str, Any] | None = None
        self.forward_to: ReplayPosition | None = None
        self.ended = False
        self._stand_ins: list[Any] = []  # delivered in place of batches that were used
        cursor.made(self)

    @property
    def loader(self) -> Any:
        """What it passes over."""
        return self._source.loader

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> Any:
        if not self._source.is_open and not self.ended:
            self._begin()
        elif self._cursor.replaying:
            self._cursor.take_up(self)
        if self._stand_ins:
            return self._stand_ins.pop()
        if self.forward_to is not None:
            self._forward(self.forward_to)
            self._cursor.went_on()
        if self.ended:
            raise StopIteration
        self._cursor.before_batch(self)
        batch = self._draw()
        self.handed_out += 1
        self._cursor.after_batch(self)
        return batch

    def take_up(self, saved: ReplayPosition) -> None:
        """Go on as this saved pass."""
        self.forward_to, self.ended = saved, False

    def end(self) -> None:
        """Deliver nothing more: the saved position is in a later pass."""
        self.ended = True

    # --- what is saved ---

    def position(self) -> ReplayPosition:
        """Where it is, in plain values."""
        return {
            "ordinal": self.ordinal,
            "handed_out": self.handed_out,
            "start": self.start,
            "rng_of_last_call": self.rng_of_last_call,
            "batch": batch_size(self.loader),
            "num_rows": num_rows(self.loader),
            "rows": self._source.rows_after(self.handed_out),
            "data": self._source.identity,
        }

    @property
    def is_incomplete(self) -> bool:
        """Whether the random numbers of a batch that waits in a prepared loader would be other ones than they were."""
        is_shard = type(self.loader) is DataLoaderShard or isinstance(self.loader, RankLoader)
        waits = is_shard and self.handed_out > 1 and not self.ended
        return waits and self.rng_of_last_call is None

    def state(self) -> dict[str, Any]:
        """What decides the order of a pass that begins now."""
        return {"rng": randomness.snapshot(), **order_of(self.loader), "parts": own_parts.state_of(self.loader)}

    # --- beginning ---

    def _begin(self) -> None:
        self._cursor.begin(self)
        self.start = self.state()
        plan, number = self._cursor.plan(self)
        if self.ordinal > 0:
            self._source.follows_passes()
        if plan == "nothing":
            self.ended = True
        elif plan == "stand in":
            self._source.open()
            self._stand_ins = [self._first()] * number
            self.ended = True
        elif plan == "forward":
            self._stand_ins = [self._forward(self._cursor.saved_pass(self.key))] * number
            if not self._cursor.replaying:
                self._cursor.went_on()
        else:
            self._source.open()

    def _first(self) -> Any:
        try:
            return self._draw()
        except StopIteration:
            return None

    def _draw(self) -> Any:
        try:
            return self._source.draw()
        except StopIteration:
            self.ended = True
            self._cursor.finished(self)
            raise

    # --- getting back ---

    def _forward(self, saved: ReplayPosition) -> Any:
        """Be where a saved pass was: the same order of samples, `handed_out` of them used. Returns the last one."""
        self.forward_to = None
        rows = saved.get("rows")
        source = self._source
        if source.rows_after(0) is None:
            rows = None
        if rows is None and (size := batch_size(self.loader)) != saved["batch"]:
            raise ResumeMissed(
                f"the saved place counts batches of {saved['batch']} samples over all ranks, this loader makes "
                f"batches of {size}: change the size per rank so that the whole batch is as before. (A cell that "
                "changes its batches as it trains cannot go on in the middle.)"
            )
        self._check_rows(saved)
        if source.identity != saved.get("data"):
            raise ResumeMissed(f"the saved place is in other data: {saved.get('data')}; now it is {source.identity}.")
        now = randomness.snapshot()
        self.start = saved["start"]
        self.set_state(self.start)
        last = None
        used, rng = saved["handed_out"], saved["rng_of_last_call"]
        for _ in range(source.open_after(used, rng) if rows is None else source.open_at(rows, used, rng)):
            last = self._draw()
        self.handed_out = saved["handed_out"]
        self.rng_of_last_call = saved["rng_of_last_call"]
        randomness.restore(now)
        return last

    def _check_rows(self, saved: ReplayPosition) -> None:
        """Raise ResumeMissed where the data has another length than it had: its order would be another one."""
        was, now = saved.get("num_rows"), num_rows(self.loader)
        if was is not None and was != now:
            raise ResumeMissed(
                f"the saved place is in {was:,} rows, and executed again the cell has made a loader of {now} rows. "
                "Where data grows as the cell trains, it cannot go on in the middle: give each round a cell of its own."
            )

    def set_state(self, start: dict[str, Any]) -> None:
        """The order of the next pass is that of one which began in this state."""
        randomness.restore(start["rng"])
        set_order(self.loader, start)
        if "parts" in start:
            own_parts.put(self.loader, start["parts"])


class TrackedSteps(TrackedIterator):
    """A pass over the steps of `run.steps(total)`, which have no order to restore."""

    def state(self) -> dict[str, Any]:
        return {}

    def set_state(self, start: dict[str, Any]) -> None:
        """Steps are in order."""

    def __next__(self) -> int:
        step: int = super().__next__()
        return step
