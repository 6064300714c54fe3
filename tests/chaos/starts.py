"""A thousand world starts by owners who all want more than half of the slots: all or nothing, never a deadlock, fair."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.errors import Busy
from tests.chaos.figures import seconds
from tests.support.worlds import AgentElsewhere, Ranks

OWNERS = 4
RANKS, SLOTS = 3, 4
WAIT_S = 0.05


@dataclass
class Contest:
    """Owners that start worlds through one server, each as soon as its last one has ended.

    Attributes:
        lasted: from the first time an owner asked to the end of its world, in seconds.
        before: how many worlds of others were started while an owner waited.
    """

    server: Any  # what has a pool, and does what it is asked in the pool's loop
    starts: int
    seed: int = 0
    lasted: list[float] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    num_refused: int = 0
    _num_begun: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Until all have started and ended."""
        threads = [threading.Thread(target=self._own, args=(number,)) for number in range(OWNERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _own(self, number: int) -> None:
        source = random.Random(self.seed * 100 + number)
        while True:
            with self._lock:
                if self._num_begun >= self.starts:
                    return
                self._num_begun += 1
                ticket, served = f"t{self._num_begun}", len(self.before)
            began = time.monotonic()
            world = self._start(ticket, source)
            with self._lock:
                self.before.append(len(self.before) - served)
            world.end()
            with self._lock:
                self.lasted.append(time.monotonic() - began)

    def _start(self, ticket: str, source: random.Random) -> Ranks:
        while True:
            try:
                placement = self.server.do(self.server.pool.place(None, RANKS, ticket))
                agents = placement["agents"]
                leader = AgentElsewhere(agents[0]["address"])
                return Ranks(leader, RANKS, agents=agents, world_id=placement["world_id"])
            except Busy:
                with self._lock:
                    self.num_refused += 1
            time.sleep(source.uniform(0, 2 * WAIT_S))  # holding nothing


def main(starts: int = 1000, seed: int = 0) -> bool:
    """Print counts and times; returns whether every start came through and every slot is free again."""
    from tests.cluster.test_clusters import Server

    server = Server()
    try:
        server.do(server.pool.start(workers=2, options={"slots": SLOTS // 2}))
        server.world(SLOTS).end()  # the agents have imported what ranks need
        contest = Contest(server, starts, seed)
        contest.run()
        server.world(SLOTS).end()  # every slot is free again
    finally:
        server.end()
    print(
        f"starts: {len(contest.lasted)} of {starts} by {OWNERS} owners, refused and tried again {contest.num_refused}, "
        f"at most {max(contest.before)} others served before; {seconds(contest.lasted)}"
    )
    return len(contest.lasted) == starts
