"""A thousand world starts by owners who all want more than half of the slots: all or nothing, and never a deadlock."""

from __future__ import annotations

import random
import threading
import time

from jupyter_llmcloud.errors import Busy
from tests.chaos.figures import seconds
from tests.worlds import AgentProcess, Ranks

OWNERS = 4
WAIT_S = 0.02


def main(starts: int = 1000, seed: int = 0) -> bool:
    """Print counts and times; returns whether every start came through and every slot is free again."""
    agents = [AgentProcess(slots=2), AgentProcess(slots=2)]
    started, refused, times = [0], [0], [0.0]
    lock = threading.Lock()

    def own(number: int) -> None:
        source = random.Random(seed * 100 + number)
        while True:
            with lock:
                if started[0] >= starts:
                    return
                started[0] += 1
            began = time.monotonic()
            first, second = source.sample(agents, 2)
            while True:
                try:
                    world = Ranks(first, shares=[(first, 2), (second, 1)])
                except Busy:
                    with lock:
                        refused[0] += 1
                    time.sleep(source.uniform(0, WAIT_S))  # holding nothing
                    continue
                break
            world.end()
            with lock:
                times.append(time.monotonic() - began)

    threads = [threading.Thread(target=own, args=(number,)) for number in range(OWNERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = Ranks(agents[0], shares=[(agents[0], 2), (agents[1], 2)])  # every slot is free again
    last.end()
    for agent in agents:
        agent.end()
    print(
        f"starts: {len(times) - 1} of {starts} by {OWNERS} owners, refused and tried again {refused[0]}; {seconds(times)}"
    )
    return len(times) - 1 == starts
