"""Which places of an epoch each rank takes in each step: every row once, in as many steps on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from jupyter_llmcloud.errors import UsageError

LAST = ("share", "pad", "drop")


@dataclass(frozen=True)
class EpochShares:
    """The steps of an epoch, from a row on.

    Attributes:
        num_rows: of the epoch.
        global_batch: rows of a step, over all ranks.
        world_size: ranks.
        start: rows that were used before, by however many ranks.
        last: what becomes of the rows at the end that fill no step: "share" (each goes to one rank, as evenly as it
            can be), "pad" (filled up with rows from the beginning, as Accelerate does), "drop".
    """

    num_rows: int
    global_batch: int
    world_size: int
    start: int = 0
    last: str = "share"

    def __post_init__(self) -> None:
        if self.last not in LAST:
            raise UsageError(f"last={self.last!r} is not possible. Choose one of {', '.join(LAST)}.")
        if self.global_batch < self.world_size:
            raise UsageError(
                f"a batch of {self.global_batch} rows over {self.world_size} ranks leaves ranks without a row: give "
                f"global_batch_size={self.world_size} or more."
            )
        if not self.start and self.num_rows < self.world_size:
            raise UsageError(
                f"there are {self.num_rows} rows for {self.world_size} ranks, so that ranks would have none: use fewer "
                "ranks, or more data."
            )

    @property
    def num_steps(self) -> int:
        """Steps that are left."""
        left = max(0, self.num_rows - self.start)
        full, rest = divmod(left, self.global_batch)
        if not rest or self.last == "drop":
            return full
        if self.last == "share" and full and rest < self.world_size:
            return full  # the rest goes with the step before it: a step of its own would leave ranks without a row
        return full + 1

    def places(self, step: int, rank: int) -> range | list[int]:
        """What a rank takes in a step, counted from `start`; never nothing."""
        first = self.start + step * self.global_batch
        is_last = step == self.num_steps - 1
        if is_last and self.last == "share":
            num = self.num_rows - first
            if num < self.world_size:  # at a new size of the world, at the very end: some are repeated
                return [first + rank % num]
        else:
            num = self.global_batch
        low, high = num * rank // self.world_size, num * (rank + 1) // self.world_size
        if first + high <= self.num_rows:
            return range(first + low, first + high)
        return [place % self.num_rows for place in range(first + low, first + high)]

    def rows_after(self, steps: int) -> int:
        """Rows that are used when so many steps from `start` on are done."""
        if steps >= self.num_steps and self.last != "drop":
            return self.num_rows
        return self.start + steps * self.global_batch
