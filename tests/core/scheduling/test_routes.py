"""Which way is taken to a worker, by values."""

from __future__ import annotations

from jupyter_llmcloud.core.scheduling.routes import DIRECT, RELAYED, Routes


def test_a_worker_is_tried_straight_until_that_fails() -> None:
    routes = Routes(retry_s=60)
    assert routes.order("w", 0) == (DIRECT, RELAYED)
    routes.failed("w", DIRECT, 0)
    assert routes.order("w", 59) == (RELAYED, DIRECT)
    assert routes.order("other", 59) == (DIRECT, RELAYED)


def test_it_is_tried_again_later_and_later_up_to_a_bound() -> None:
    routes = Routes(retry_s=60, max_retry_s=200)
    now, waits = 0.0, []
    for _ in range(4):
        routes.failed("w", DIRECT, now)
        began = now
        while routes.order("w", now)[0] == RELAYED:
            now += 1
        waits.append(now - began)
    assert waits == [60, 120, 200, 200]


def test_once_it_leads_there_it_is_the_way_again() -> None:
    routes = Routes(retry_s=60)
    routes.failed("w", DIRECT, 0)
    routes.worked("w", RELAYED)
    assert routes.order("w", 1)[0] == RELAYED
    routes.worked("w", DIRECT)
    assert routes.order("w", 1)[0] == DIRECT
    routes.failed("w", RELAYED, 1)
    assert routes.order("w", 2)[0] == DIRECT
