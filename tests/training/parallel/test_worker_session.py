"""What the workers of `--plan async-ps` do together at the first server: by values, with threads in place of ranks."""

from __future__ import annotations

import threading
from typing import Any

from jupyter_llmcloud.training.parallel.asynchronous.session import WorkerSession


class Open:
    """A connection that stays."""

    is_closed = False


WIRE: Any = Open()


class Waiting:
    """Tells when a worker has come to the place where it waits."""

    def __init__(self, session: WorkerSession) -> None:
        self.has_come = threading.Event()
        original = session._wait

        def wait(*args: Any) -> None:
            self.has_come.set()
            original(*args)

        session._wait = wait  # type: ignore[method-assign]


def test_a_worker_that_waits_for_all_before_any_round_has_ended_holds_nobody_up() -> None:
    # Its stream was so short that it never came to the end of a round; the other one trains on.
    session = WorkerSession("cell", num_workers=2, most_steps=8, staleness=1)
    waiting = Waiting(session)
    short = threading.Thread(target=lambda: session.meet(WIRE, 1, 1, b"one"), daemon=True)
    short.start()
    assert waiting.has_come.wait(10)
    found: list[dict[int, bytes]] = []

    def train() -> None:
        for _ in range(4):
            session.finish_round(WIRE, 0, 0, 8, 1.0)
        found.append(session.meet(WIRE, 0, 1, b"zero"))

    long = threading.Thread(target=train, daemon=True)
    long.start()
    long.join(10)
    short.join(10)
    session.close()
    assert found == [{0: b"zero", 1: b"one"}]
