"""When a run tells where its ranks spend their time."""

from __future__ import annotations

import asyncio

from jupyter_llmcloud.agent.runs.time_log import TimeLog
from jupyter_llmcloud.protocol.rank_messages import RankTimes

TIMES = RankTimes(attempt=0, spent=[1.0, 0.5, 0.0, 0.0])


async def timers() -> list[bool]:
    """Whether a log that has heard a rank waits to tell of it: on the way, as the rank ends, and both."""
    loop = asyncio.get_running_loop()
    found = []
    for lasts in ([False], [True], [False, True]):
        before = loop.time()
        log = TimeLog({}, lambda shares, seconds: None)
        log.begin(0, [0, 1])
        for is_last in lasts:
            log.heard(0, TIMES, is_last=is_last)
        due = [handle for handle in loop._scheduled if not handle.cancelled() and handle.when() > before]  # type: ignore[attr-defined]
        found.append(bool(due))
        log.close()
    return found


def test_a_rank_that_has_ended_is_told_of_with_those_that_go_on() -> None:
    assert asyncio.run(timers()) == [True, False, True]


async def seconds_of_a_long_run() -> dict[int, dict[str, float]]:
    log = TimeLog({0: {"compute": 2.0}}, lambda shares, seconds: None)
    log.begin(0, [0])
    log.heard(0, TIMES, is_last=True)
    log.close()
    return log.seconds()


def test_what_a_rank_says_as_it_ends_is_counted() -> None:
    told = asyncio.run(seconds_of_a_long_run())
    assert sum(told[0].values()) == 3.5
