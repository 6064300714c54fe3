"""A loader that knows its rank, and where it is in its rows."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.data.rank_batches import Position, RankBatches
from jupyter_llmcloud.training.data.streams import StreamShare
from jupyter_llmcloud.training.parallel.balance import BALANCE


class RankLoader(DataLoaderShard):
    """Batches of this rank. Accelerate takes it as prepared, and does not share its batches out again.

    Attributes:
        identity: the rows and their order, in words: what a place in them belongs to.
    """

    def __init__(self, dataset: Any, identity: str, **options: Any) -> None:
        super().__init__(dataset, device=_device(), **options)
        self.identity = identity
        self._is_accelerate_prepared = True
        self._num_delivered = 0

    @property
    def rows(self) -> RankBatches | StreamShare:
        """What knows which rows come: the batch sampler, or the stream."""
        sampler = self.base_dataloader.batch_sampler
        found: RankBatches | StreamShare = sampler if isinstance(sampler, RankBatches) else self.base_dataloader.dataset
        return found

    @property
    def position(self) -> Position:
        """Where the next pass begins."""
        return self.rows.position

    @property
    def total_batch_size(self) -> int:
        """Rows of a step over all ranks."""
        return self.rows.global_batch

    def rows_after(self, batches: int) -> int:
        """Rows of the epoch, over all ranks, that are used after so many batches of the present pass."""
        return self.position.rows_after(batches, self.rows.shares)

    # --- Accelerate's own pass, batch by batch ---

    def begin(self) -> None:
        """A pass begins."""
        self._num_delivered = 0
        super().begin()
        self.remainder = self.rows.remainder

    def _update_state_dict(self) -> None:
        # Called before each batch that is delivered, and for the last one once more.
        if not self.end_of_dataloader:
            self._num_delivered += 1
            if BALANCE.keeps_batches:  # of a stream the last batch may be shorter than is known here
                BALANCE.note_rows(self.position.rows_of(self._num_delivered - 1, self.rows.shares))

    def end(self) -> None:
        """A pass has ended."""
        self._num_delivered = 0
        super().end()

    # --- resumed by hand: by loops outside of cells, and by libraries ---

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the rows of it that were used over all ranks: the same on every rank."""
        rows = self.rows_after(self._num_delivered) if self._num_delivered else self.position.start
        is_last = bool(self._num_delivered) and self.end_of_dataloader
        if is_last or not self.rows.has_steps_after(rows):
            return {"epoch": self.iteration + 1, "rows": 0, "data": self.identity}
        return {"epoch": self.iteration, "rows": rows, "data": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there with the next pass, on however many ranks there are now. Raises UsageError for other data."""
        self.check_identity(state_dict["data"])
        epoch, rows = int(state_dict["epoch"]), int(state_dict["rows"])
        if not self.rows.has_steps_after(rows):  # too few are left here: Accelerate does not count a pass without any
            epoch, rows = epoch + 1, 0
        self.iteration = epoch
        self.rows.set_epoch(epoch)
        self.position.go_on_at(rows, 0)

    def check_identity(self, saved: str) -> None:
        """Raise UsageError when a place belongs to other rows, or to another order of them."""
        if saved != self.identity:
            raise UsageError(
                f"the saved place is in other data, or in another order of it: {saved}; now it is {self.identity}. "
                "Load the data of then with the same options, or begin anew."
            )

    def __reduce__(self) -> Any:
        raise TypeError("a loader of lc.data.load stays in its process: load the data again where it is needed.")


def _device() -> torch.device | None:
    """Where batches go: this rank's GPU, if it has one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
