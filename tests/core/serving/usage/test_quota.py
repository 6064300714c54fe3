"""What a key may ask, by values: windows that slide, tokens that are reserved and settled, the headers."""

from __future__ import annotations

import dataclasses
import random

import pytest

from jupyter_llmcloud.core.serving.usage.quota import (
    KeyLimits,
    KeyQuota,
    QuotaExceeded,
    Window,
    duration,
)
from jupyter_llmcloud.core.spec import KeySpec
from jupyter_llmcloud.protocol.http.keys import CreateKey, Key


def test_the_options_of_a_key_are_its_limits_at_every_door() -> None:
    names = [option.name for option in KeySpec.options()]
    assert names == [field.name for field in dataclasses.fields(KeyLimits)]
    assert set(names) <= set(CreateKey.__struct_fields__) and set(names) <= set(Key.__struct_fields__)


def test_requests_beyond_the_limit_are_refused_until_the_first_is_a_minute_old() -> None:
    quota, limits = KeyQuota(), KeyLimits(requests_per_minute=2)
    quota.reserve(limits, 0, now=100.0)
    quota.reserve(limits, 0, now=130.0)
    with pytest.raises(QuotaExceeded, match="its limit is 2 requests per minute") as refused:
        quota.reserve(limits, 0, now=140.0)
    assert refused.value.retry_after_s == pytest.approx(21.0)
    quota.reserve(limits, 0, now=140.0 + refused.value.retry_after_s)


@pytest.mark.parametrize("seed", range(20))
def test_in_no_minute_is_more_let_in_than_the_limit(seed: int) -> None:
    rng, quota, limits = random.Random(seed), KeyQuota(), KeyLimits(requests_per_minute=7, tokens_per_minute=500)
    admitted: list[tuple[float, int]] = []
    now = 0.0
    for _ in range(400):
        now += rng.expovariate(0.5)
        tokens = rng.randrange(1, 200)
        try:
            reserved = quota.reserve(limits, tokens, now)
        except QuotaExceeded as error:
            assert 0 < error.retry_after_s <= 61
            continue
        quota.settle(reserved, tokens, now)
        admitted.append((now, tokens))
        recent = [row for row in admitted if now - row[0] < 60]
        assert len(recent) <= 7 and sum(row[1] for row in recent) <= 500
    assert len(admitted) > 40


def test_what_waits_as_long_as_it_is_told_is_let_in() -> None:
    quota, limits = KeyQuota(), KeyLimits(tokens_per_minute=100)
    for second in range(10):
        quota.settle(quota.reserve(limits, 10, now=second), 10, now=second)
    with pytest.raises(QuotaExceeded) as refused:
        quota.reserve(limits, 35, now=20.5)
    assert refused.value.limited == "tokens"
    quota.reserve(limits, 35, now=20.5 + refused.value.retry_after_s)


def test_tokens_that_were_reserved_and_not_spent_are_given_back() -> None:
    quota, limits = KeyQuota(), KeyLimits(tokens_per_minute=100)
    reserved = quota.reserve(limits, 90, now=0.0)
    with pytest.raises(QuotaExceeded):
        quota.reserve(limits, 50, now=1.0)
    quota.settle(reserved, 20, now=2.0)
    quota.reserve(limits, 80, now=2.0)
    assert quota.headers(limits, 2.0)["x-ratelimit-remaining-tokens"] == "0"


def test_tokens_beyond_the_reservation_count_from_the_end_of_the_answer_however_long_it_took() -> None:
    quota, limits = KeyQuota(), KeyLimits(tokens_per_minute=100)
    reserved = quota.reserve(limits, 10, now=0.0)
    quota.settle(reserved, 500, now=300.0)
    with pytest.raises(QuotaExceeded):
        quota.reserve(limits, 1, now=355.0)
    quota.reserve(limits, 1, now=361.5)


def test_a_reservation_is_settled_once() -> None:
    quota, limits = KeyQuota(), KeyLimits(tokens_per_minute=100, parallel_requests=1)
    reserved = quota.reserve(limits, 50, now=0.0)
    quota.close(reserved)
    quota.close(reserved)
    quota.settle(reserved, 10, now=1.0)
    quota.settle(reserved, 10, now=1.0)
    assert quota.num_open == 0
    assert quota.headers(limits, 1.0)["x-ratelimit-remaining-tokens"] == "90"


def test_a_request_estimated_above_the_limit_is_let_in_when_nothing_was_spent() -> None:
    quota, limits = KeyQuota(), KeyLimits(tokens_per_minute=100)
    quota.settle(quota.reserve(limits, 10_000, now=0.0), 1, now=0.0)
    with pytest.raises(QuotaExceeded):
        quota.reserve(limits, 10_000, now=1.0)


def test_requests_at_once_are_counted_until_they_have_ended() -> None:
    quota, limits = KeyQuota(), KeyLimits(parallel_requests=2)
    first, _ = quota.reserve(limits, 0, now=0.0), quota.reserve(limits, 0, now=0.0)
    with pytest.raises(QuotaExceeded, match="2 requests at once"):
        quota.reserve(limits, 0, now=0.0)
    quota.close(first)
    quota.reserve(limits, 0, now=0.0)


def test_a_refused_request_reserves_nothing() -> None:
    quota, limits = KeyQuota(), KeyLimits(requests_per_minute=5, tokens_per_minute=10, parallel_requests=9)
    quota.reserve(limits, 10, now=0.0)
    for _ in range(20):
        with pytest.raises(QuotaExceeded):
            quota.reserve(limits, 5, now=1.0)
    assert quota.num_open == 1
    assert quota.headers(limits, 1.0)["x-ratelimit-remaining-requests"] == "4"


def test_a_quota_goes_on_from_what_was_asked_before_a_restart() -> None:
    quota, limits = KeyQuota([(10.0, 30), (20.0, 40)]), KeyLimits(requests_per_minute=2, tokens_per_minute=100)
    with pytest.raises(QuotaExceeded):
        quota.reserve(limits, 1, now=30.0)
    assert quota.headers(limits, 30.0)["x-ratelimit-remaining-tokens"] == "30"
    assert not quota.is_idle(60.0) and quota.is_idle(82.0)


def test_the_headers_are_those_of_the_limits_that_there_are() -> None:
    quota, limits = KeyQuota(), KeyLimits(requests_per_minute=60)
    quota.reserve(limits, 0, now=10.25)
    assert quota.headers(limits, 10.25) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1m1s",
    }
    assert quota.headers(KeyLimits(), 10.25) == {}
    assert not KeyLimits().any and limits.any


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.0123, "13ms"), (6, "6s"), (5.2, "6s"), (60, "1m0s"), (61.5, "1m2s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_window_of_many_requests_stays_small() -> None:
    window = Window()
    for step in range(100_000):
        window.add(1, step / 1000)
    assert len(window._spent) <= 101
    assert window.total(1000.0) == 0 and window.reset_s(1000.0) == 0.0
