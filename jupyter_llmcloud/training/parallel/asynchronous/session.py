"""What the workers of one cell do together at a parameter server: rounds of each model, and places where all meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.core.parallel.left_rows import PassEnds
from jupyter_llmcloud.core.parallel.worker_rounds import WorkerRounds
from jupyter_llmcloud.training.parallel.asynchronous.wire import ServerGone, Wire

_LOOK_S = 0.2  # a worker that waits here may have gone meanwhile
_END = -1  # the number of the last meeting


class WorkerSession:
    """One cell on all its workers; called by the threads that serve them.

    Args:
        key: of the cell, the same for all workers.
        num_workers, most_steps, staleness: as WorkerRounds has them.
    """

    def __init__(self, key: str, num_workers: int, most_steps: int, staleness: int) -> None:
        self.key = key
        self._settings = num_workers, most_steps, staleness
        self._changed = threading.Condition()
        self._rounds: dict[int, WorkerRounds] = {}
        self._gone: dict[int, bool] = {}  # workers that are done (True) or lost (False)
        self._waiting: set[int] = set()  # workers that wait for all others
        self._given: dict[int, dict[int, bytes]] = {}
        self._results: dict[int, dict[int, bytes]] = {}
        self._passes = PassEnds()
        self._is_over = False

    def num_live(self) -> int:
        """Workers that are not lost."""
        with self._changed:
            return len(self._live())

    def lost(self) -> list[int]:
        """Workers that have gone."""
        with self._changed:
            return self._lost()

    def rounds(self, model: int) -> list[int]:
        """How many rounds each worker has finished with a model."""
        with self._changed:
            rounds = self._of(model)
            return [rounds.rounds_of(worker) for worker in range(self._settings[0])]

    def finish_round(self, wire: Wire, worker: int, model: int, num_steps: int, seconds: float) -> int:
        """A worker has finished a round; waits until it may go on. Returns the steps of its next one."""
        with self._changed:
            rounds = self._of(model)
            rounds.finish(worker, num_steps, seconds)
            self._changed.notify_all()
            self._wait(wire, lambda: rounds.may_go_on(worker))
            return rounds.num_steps(worker)

    def meet(self, wire: Wire, worker: int, number: int, given: bytes) -> dict[int, bytes]:
        """Wait for all workers that still train; returns what each has given. Number -1 is the end of the cell."""
        with self._changed:
            if number == _END:
                self._leave(worker, is_done=True)
            self._given.setdefault(number, {})[worker] = given
            self._set_waiting(worker, True)
            self._wait(wire, lambda: self._is_complete(number))
            self._set_waiting(worker, False)
            # Whoever wakes first settles it, so that all get the same, also when a worker is lost just now.
            return self._results.setdefault(number, dict(sorted(self._given[number].items())))

    def _is_complete(self, number: int) -> bool:
        if number in self._results:
            return True
        awaited = self._live()
        if number != _END:
            awaited = [worker for worker in self._training() if not self._passes.is_waiting(worker)]
        if not all(worker in self._given[number] for worker in awaited):
            return False
        self._results = {key: value for key, value in self._results.items() if key >= number - 1}
        self._given = {key: value for key, value in self._given.items() if key == _END or key >= number - 1}
        return True

    # --- the ends of passes ---

    def note_trained(self, worker: int, model: int, places: Mapping[str, Sequence[int]]) -> None:
        """What a worker has sent of a model is up to these places in its passes."""
        with self._changed:
            for key, (phase, number) in places.items():
                self._passes.note(worker, model, key, (phase, number))

    def end_phase(self, wire: Wire, worker: int, key: str, phase: int, num_meetings: int) -> dict[str, Any]:
        """A worker has trained on all it has in a phase of a pass, and has sent that; waits for the others.

        What those that were lost have left is given out once, to those that wait here; and all count their meetings
        alike again, of which they may have had different numbers.
        """
        with self._changed:
            self._passes.arrive(worker, key, phase, num_meetings)
            self._set_waiting(worker, True)
            self._wait(wire, lambda: self._passes.settle(key, phase, self._training(), self._lost()))
            self._set_waiting(worker, False)
            return self._passes.answer(key, phase)

    def lose(self, worker: int) -> None:
        """The connection of a worker has ended; nothing when it was done."""
        with self._changed:
            if worker not in self._gone:
                self._leave(worker, is_done=False)
                self._changed.notify_all()

    def close(self) -> None:
        """Another cell has begun."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _set_waiting(self, worker: int, waits: bool) -> None:
        (self._waiting.add if waits else self._waiting.discard)(worker)
        for rounds in self._rounds.values():
            rounds.wait(worker, waits)
        self._changed.notify_all()

    def _leave(self, worker: int, is_done: bool) -> None:
        self._gone[worker] = is_done
        for rounds in self._rounds.values():
            (rounds.end if is_done else rounds.lose)(worker)

    def _live(self) -> list[int]:
        return [worker for worker in range(self._settings[0]) if self._gone.get(worker, True)]

    def _training(self) -> list[int]:
        return [worker for worker in range(self._settings[0]) if worker not in self._gone]

    def _lost(self) -> list[int]:
        return [worker for worker, is_done in self._gone.items() if not is_done]

    def _of(self, model: int) -> WorkerRounds:
        if model not in self._rounds:
            rounds = self._rounds[model] = WorkerRounds(*self._settings)
            for worker, is_done in self._gone.items():
                (rounds.end if is_done else rounds.lose)(worker)
            for worker in self._waiting:  # before anybody had finished a round
                rounds.wait(worker, True)
        return self._rounds[model]

    def _wait(self, wire: Wire, is_ready: Callable[[], Any]) -> None:
        while not self._changed.wait_for(lambda: self._is_over or is_ready(), _LOOK_S):
            if wire.is_closed:
                raise ServerGone("connection closed by a worker of --plan async-ps")
        if self._is_over:
            raise ServerGone("connection closed: another cell of --plan async-ps has begun")
