"""The rates of an endpoint, by values."""

from __future__ import annotations

from jupyter_llmcloud.core.serving.usage.rates import MAX_KEPT, Answered, RateWindow


def test_rates_are_those_of_the_window_and_a_client_that_hung_up_is_no_error() -> None:
    window = RateWindow(10.0)
    window.add(Answered(t=1.0, status=500))
    window.add(Answered(t=15.0, status=200, first_byte_s=0.2, num_tokens=30))
    window.add(Answered(t=16.0, status=200, first_byte_s=0.4, num_tokens=20))
    window.add(Answered(t=17.0, status=499))
    window.add(Answered(t=18.0, status=503))
    rates = window.rates(20.0)
    assert rates["requests_per_s"] == 0.4 and rates["tokens_per_s"] == 5.0 and rates["errors_per_s"] == 0.1
    assert rates["first_token_s"] is not None and abs(rates["first_token_s"] - 0.3) < 1e-9


def test_an_endpoint_that_nobody_asks_has_rates_of_zero() -> None:
    assert RateWindow().rates(5.0)["requests_per_s"] == 0.0 and RateWindow().rates(5.0)["first_token_s"] is None


def test_of_more_requests_than_are_kept_the_rate_is_that_at_which_the_newest_came() -> None:
    """A thousand a second were told as 333: what is kept, over the whole window."""
    window = RateWindow(60.0)
    for number in range(MAX_KEPT + 10_000):
        window.add(Answered(t=number / 1000, status=200, num_tokens=2))
    rates = window.rates((MAX_KEPT + 10_000) / 1000)
    assert rates["requests_per_s"] is not None and abs(rates["requests_per_s"] - 1000) < 1
    assert rates["tokens_per_s"] is not None and abs(rates["tokens_per_s"] - 2000) < 2
    assert rates["window_s"] == 60.0
