"""The rounds of workers that train against a parameter server: who may go on, after how many steps, who is left.

A round is some steps of one worker, and what it sends after them. No worker may be more than `staleness` rounds ahead
of the slowest one, so that nothing that arrives is older than that. Steps are in proportion to measured speed, so that
rounds take all workers about as long (DyLU, Asynchronous Local-SGD, arXiv 2401.09135, section 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

_KEPT = 0.5  # of a speed that was measured before
_ALIKE = 0.9  # of the fastest worker's speed counts as the same: a busy moment must not change a round


@dataclass
class _Worker:
    rounds: int = 0
    speed: float = 0.0  # steps a second; 0: not known yet
    is_done: bool = False
    is_lost: bool = False
    waits: bool = False


@dataclass
class WorkerRounds:
    """Of one model in one cell.

    Args:
        num_workers: that begin.
        most_steps: of the fastest worker's round.
        staleness: rounds that a worker may be ahead of the slowest one.
    """

    num_workers: int
    most_steps: int
    staleness: int
    _workers: list[_Worker] = field(init=False)

    def __post_init__(self) -> None:
        self._workers = [_Worker() for _ in range(self.num_workers)]

    @property
    def live(self) -> list[int]:
        """Workers that are not lost."""
        return [number for number, worker in enumerate(self._workers) if not worker.is_lost]

    @property
    def training(self) -> list[int]:
        """Workers that are neither lost nor done."""
        return [number for number in self.live if not self._workers[number].is_done]

    @property
    def lost(self) -> list[int]:
        """Workers that have gone."""
        return [number for number, worker in enumerate(self._workers) if worker.is_lost]

    def rounds_of(self, worker: int) -> int:
        """How many rounds a worker has finished."""
        return self._workers[worker].rounds

    def finish(self, worker: int, num_steps: int, seconds: float) -> None:
        """A worker has finished a round of so many steps, for which it has computed so long."""
        own = self._workers[worker]
        own.rounds += 1
        if num_steps > 0 and seconds > 0:
            measured = num_steps / seconds
            own.speed = _KEPT * own.speed + (1 - _KEPT) * measured if own.speed else measured

    def end(self, worker: int) -> None:
        """A worker has trained on all it had: nobody waits for it."""
        self._workers[worker].is_done = True

    def lose(self, worker: int) -> None:
        """A worker has gone: nobody waits for it, and its speed counts no more."""
        self._workers[worker].is_lost = True

    def wait(self, worker: int, waits: bool) -> None:
        """A worker waits for all others elsewhere, so that nobody can wait for it; or does not any more."""
        self._workers[worker].waits = waits

    def may_go_on(self, worker: int) -> bool:
        """Whether a worker may begin its next round now."""
        awaited = (self._workers[other] for other in self.training)
        slowest = min((other.rounds for other in awaited if not other.waits), default=self._workers[worker].rounds)
        return self._workers[worker].rounds - slowest <= self.staleness

    def num_steps(self, worker: int) -> int:
        """Of a worker's next round."""
        own, fastest = (
            self._workers[worker].speed,
            max((self._workers[other].speed for other in self.training), default=0),
        )
        if not own or not fastest or own >= _ALIKE * fastest:
            return self.most_steps
        return max(1, round(self.most_steps * own / fastest))
