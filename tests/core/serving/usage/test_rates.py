"""The rates of an endpoint, by values."""

from __future__ import annotations

from jupyter_llmcloud.core.serving.usage.rates import Answered, RateWindow


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
