"""Which replica answers, by values."""

from __future__ import annotations

from collections import Counter

from jupyter_llmcloud.core.serving.endpoint.routing import (
    CircuitBreaker,
    ReplicaLoad,
    RequestShape,
    closed,
    pick_replica,
    pick_revision,
    relative_speeds,
)

PLAIN = RequestShape(num_tokens=100)


def test_the_replica_with_the_fewest_tokens_before_it_answers_not_that_with_the_fewest_requests() -> None:
    long, short = ReplicaLoad(), ReplicaLoad()
    long.enter(RequestShape(num_tokens=4000))
    short.enter(RequestShape(num_tokens=50))
    short.enter(RequestShape(num_tokens=50))
    assert pick_replica(PLAIN, {1: long, 2: short}) == 2
    short.leave(RequestShape(num_tokens=50))
    short.leave(RequestShape(num_tokens=50))
    assert (short.num_in_flight, short.outstanding_tokens) == (0, 0)


def test_a_replica_without_a_free_place_is_not_asked() -> None:
    full, busy = ReplicaLoad(capacity=1), ReplicaLoad(capacity=2)
    full.enter(RequestShape(num_tokens=1))
    busy.enter(RequestShape(num_tokens=10_000))
    assert pick_replica(PLAIN, {1: full, 2: busy}) == 2
    busy.enter(PLAIN)
    assert pick_replica(PLAIN, {1: full, 2: busy}) is None


def test_requests_that_begin_alike_go_where_their_beginning_is_known_while_that_costs_little() -> None:
    prompt = b'"' + b"You are a helpful assistant. " * 40
    shape = RequestShape.estimate(prompt, 64, None)
    loads = {1: ReplicaLoad(), 2: ReplicaLoad()}
    loads[2].enter(shape)
    loads[2].leave(shape)
    assert pick_replica(shape, loads) == 2 and pick_replica(PLAIN, loads) == 1
    loads[2].enter(RequestShape(num_tokens=5000))
    assert pick_replica(shape, loads) == 1  # to wait behind 5000 tokens costs more than to read the prompt again
    loads[2].leave(RequestShape(num_tokens=5000))
    loads[2].forget()
    assert pick_replica(shape, loads) == 1


def test_an_adapter_that_is_in_use_somewhere_is_asked_there() -> None:
    adapted = RequestShape(num_tokens=10, num_prompt_tokens=5, adapter="legal")
    loads = {1: ReplicaLoad(), 2: ReplicaLoad()}
    loads[2].enter(adapted)
    loads[2].leave(adapted)
    assert pick_replica(adapted, loads) == 2


def test_a_replica_twice_as_fast_gets_about_twice_as_much() -> None:
    slow, fast = ReplicaLoad(capacity=10_000), ReplicaLoad(capacity=10_000)
    slow.measure(100, 2.0)
    fast.measure(100, 1.0)
    assert relative_speeds({1: slow, 2: fast})[2] / relative_speeds({1: slow, 2: fast})[1] == 2
    counts = Counter()
    for _ in range(300):
        number = pick_replica(PLAIN, {1: slow, 2: fast})
        {1: slow, 2: fast}[number].enter(PLAIN)
        counts[number] += 1
    assert 1.8 <= counts[2] / counts[1] <= 2.2


def test_a_few_tokens_say_nothing_of_the_speed_and_one_slow_answer_little() -> None:
    load = ReplicaLoad()
    load.measure(3, 10.0)
    assert load.tokens_per_s is None
    load.measure(100, 1.0)
    load.measure(100, 10.0)
    assert 80 < (load.tokens_per_s or 0) < 100


def test_an_estimate_survives_whatever_a_body_says() -> None:
    for max_tokens in (None, "many", -5, 1.5, True, [], 10**30):
        shape = RequestShape.estimate(b'"hello"', max_tokens, "two")
        assert 0 < shape.num_tokens <= 1 << 20 and shape.prefix == 0


def test_the_requests_of_a_key_stay_with_their_revision_and_shares_are_kept() -> None:
    keys = [f"key:{number}" for number in range(4000)]
    five = {key: pick_revision({1: 95, 2: 5}, key) for key in keys}
    assert 0.03 < sum(number == 2 for number in five.values()) / len(keys) < 0.07
    assert five == {key: pick_revision({1: 95, 2: 5}, key) for key in keys}
    twenty = {key: pick_revision({1: 80, 2: 20}, key) for key in keys}
    assert all(twenty[key] == 2 for key in keys if five[key] == 2)  # nobody goes back when the share grows


def test_a_replica_that_fails_requests_gets_none_for_a_while_then_one_then_all() -> None:
    breaker = CircuitBreaker(max_failures=3, open_s=5.0)
    for _ in range(2):
        breaker.note(True, 0.0)
    assert breaker.lets_through(0.0)
    breaker.note(True, 0.0)
    assert not breaker.lets_through(4.9) and breaker.lets_through(5.0)
    breaker.entered()
    assert not breaker.lets_through(5.1)  # one is enough to try
    breaker.note(True, 6.0)
    assert not breaker.lets_through(15.9) and breaker.lets_through(16.0)
    breaker.entered()
    breaker.abandoned()
    assert breaker.lets_through(16.0)
    breaker.entered()
    breaker.note(False, 17.0)
    assert breaker.lets_through(17.0) and breaker.num_failures == 0


def test_failures_of_requests_that_were_there_when_a_breaker_opened_do_not_keep_it_open_for_longer() -> None:
    breaker = CircuitBreaker(max_failures=3, open_s=5.0)
    for _ in range(32):  # all that the replica answered at once
        breaker.note(True, 1.0)
    assert not breaker.lets_through(5.9) and breaker.lets_through(6.0)


def test_when_all_replicas_fail_all_are_asked() -> None:
    broken, well = CircuitBreaker(max_failures=1), CircuitBreaker()
    broken.note(True, 0.0)
    assert list(closed({1: broken, 2: well}, 1.0)) == [2]
    assert list(closed({1: broken}, 1.0)) == [1]
