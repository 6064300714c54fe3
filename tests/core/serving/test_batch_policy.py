"""How long rows wait for others."""

from __future__ import annotations

from jupyter_llmcloud.core.serving.models.batch_policy import BatchPolicy


def busy(gap_s: float, step_s: float = 0.02, **options: float) -> BatchPolicy:
    policy = BatchPolicy(8, **options)
    for number in range(50):
        policy.arrived(number * gap_s)
    policy.computed(step_s)
    return policy


def test_the_first_request_does_not_wait() -> None:
    policy = BatchPolicy(8)
    policy.arrived(5.0)
    assert policy.wait_s(1, oldest=5.0, now=5.0) == 0


def test_one_client_after_another_does_not_wait() -> None:
    policy = busy(gap_s=0.05)
    assert policy.wait_s(1, oldest=49 * 0.05, now=49 * 0.05) == 0


def test_under_load_a_row_waits_for_those_to_come_but_less_than_a_batch_takes() -> None:
    policy = busy(gap_s=0.002)
    now = 49 * 0.002
    assert 0 < policy.wait_s(1, oldest=now, now=now) <= 0.01
    assert policy.wait_s(1, oldest=now - 0.02, now=now) == 0  # it has waited long enough


def test_a_full_batch_does_not_wait() -> None:
    policy = busy(gap_s=0.002)
    assert policy.wait_s(8, oldest=49 * 0.002, now=49 * 0.002) == 0


def test_when_nobody_comes_any_more_nobody_waits() -> None:
    policy = busy(gap_s=0.001)
    last = 49 * 0.001
    assert policy.wait_s(1, oldest=last, now=last + 0.004) == 0


def test_no_wait_is_longer_than_the_limit() -> None:
    policy = busy(gap_s=0.002, step_s=10.0, max_wait_s=0.02)
    assert policy.longest_wait_s == 0.02
