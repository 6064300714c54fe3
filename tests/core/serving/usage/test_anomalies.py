"""What is unusual in the use of a key, by values."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.usage.anomalies import (
    MAX_NETWORKS,
    MIN_REQUESTS,
    NUM_REFUSED,
    PERIOD_S,
    RULES,
    KeyAlert,
    KeyUse,
    network_of,
)


def rules(alerts: list[KeyAlert]) -> list[str]:
    assert all(alert.rule in RULES and alert.what for alert in alerts)
    return [alert.rule for alert in alerts]


def used(use: KeyUse, times: int, now: float = 0.0, address: str = "192.0.2.7") -> list[str]:
    return [rule for _ in range(times) for rule in rules(use.asked(address, now))]


def test_a_key_that_asks_from_elsewhere_is_told_once_for_each_network() -> None:
    use = KeyUse()
    assert used(use, MIN_REQUESTS) == []
    assert used(use, 5, address="192.0.2.200") == []
    assert used(use, 5, address="198.51.100.1") == ["new address"]
    assert used(use, 5, address="198.51.100.9") == []
    assert used(use, 5, address="2001:db8:1::1") == ["new address"]
    assert used(use, 5, address="2001:db8:1:ffff::2") == []


def test_a_key_that_is_new_may_come_from_anywhere() -> None:
    use = KeyUse()
    assert [rule for n in range(MIN_REQUESTS) for rule in used(use, 1, address=f"10.0.{n}.1")] == []


def test_ten_times_the_usual_requests_are_told_once_in_a_period() -> None:
    use = KeyUse()
    for period in range(4):
        assert used(use, 10, now=period * PERIOD_S) == []
    assert used(use, 99, now=4 * PERIOD_S) == []
    assert used(use, 500, now=4 * PERIOD_S) == ["sudden load"]
    assert used(use, 300, now=5 * PERIOD_S) == []  # which now is not so unusual any more


def test_a_key_that_was_hardly_used_may_be_used_more() -> None:
    use = KeyUse()
    for period in range(4):
        used(use, 1, now=period * PERIOD_S)
    assert used(use, 40, now=4 * PERIOD_S) == []


def test_ten_times_the_usual_tokens_are_told_as_well() -> None:
    use = KeyUse()
    for period in range(4):
        assert rules(use.spent(3000, period * PERIOD_S)) == []
    assert rules(use.spent(29_000, 4 * PERIOD_S)) == []
    assert rules(use.spent(1_000, 4 * PERIOD_S)) == ["sudden load"]


def test_without_a_history_nothing_is_sudden() -> None:
    assert used(KeyUse(), 10_000) == []


def test_pauses_do_not_count_as_what_is_usual() -> None:
    use = KeyUse()
    for period in range(0, 400, 100):
        used(use, 60, now=period * PERIOD_S)
    assert used(use, 500, now=400 * PERIOD_S) == []


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_a_key_that_only_gets_refusals_is_told_once_until_it_is_answered(status: int) -> None:
    use = KeyUse()
    alerts = [rule for _ in range(3 * NUM_REFUSED) for rule in rules(use.answered(status))]
    assert alerts == ["only refused"]
    use.answered(200)
    assert [rule for _ in range(NUM_REFUSED) for rule in rules(use.answered(status))] == ["only refused"]


def test_an_answer_between_refusals_is_no_alert_and_a_fault_of_ours_is_no_refusal() -> None:
    use = KeyUse()
    assert [rule for n in range(200) for rule in rules(use.answered(200 if n % NUM_REFUSED == 0 else 403))] == []
    assert [rule for _ in range(100) for rule in rules(use.answered(503))] == []


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"), ("::ffff:192.0.2.77", "192.0.2.0/24"), ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"), ("", ""), ("no address", "no address"),
    ],
)  # fmt: skip
def test_an_address_stands_for_its_network(address: str, network: str) -> None:
    assert network_of(address) == network


def test_what_is_known_of_a_key_is_bounded() -> None:
    use = KeyUse()
    for number in range(5000):
        use.asked(f"10.{number // 250}.{number % 250}.1", number * PERIOD_S)
    assert len(use._networks) <= MAX_NETWORKS
