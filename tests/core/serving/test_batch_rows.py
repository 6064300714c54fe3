"""The rows of a batch, and how many are asked at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jupyter_llmcloud.core.serving.batch_rows import RowRefused, back_off_s, num_rows_at_once, parse_row

URL = "/v1/completions"


def line(**changes: Any) -> bytes:
    row = {"custom_id": "a", "method": "POST", "url": URL, "body": {"model": "m", "prompt": "x"}, **changes}
    return json.dumps({name: value for name, value in row.items() if value is not ...}).encode()


def test_a_row_names_its_model_and_its_request() -> None:
    row = parse_row(line(), URL)
    assert (row.custom_id, row.model, row.body) == ("a", "m", {"model": "m", "prompt": "x"})


def test_a_row_may_have_any_character_and_any_finite_number() -> None:
    text = line().replace(b'"x"', b'["\\ud83d\\ude00", 1.5e3, 100000000000000000000]')
    assert parse_row(text, URL).body["prompt"] == ["\U0001f600", 1500.0, 10**20]


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (line(custom_id=...), "missing_required_parameter", "custom_id"),
        (line(custom_id="x" * 513), "missing_required_parameter", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/chat/completions"), "invalid_url", "url"),
        (line(body={"prompt": "x"}), "missing_required_parameter", "body.model"),
        (line(body={"model": "m", "stream": True}), "unsupported_parameter", "body.stream"),
        (line().replace(b'"x"', b"NaN"), "invalid_json_line", None),
        (line().replace(b'"x"', b"-1e999"), "invalid_json_line", None),
        (line().replace(b'"x"', b'"\\ud83d"'), "invalid_json_line", None),
        (line(extra=1), "unknown_parameter", "extra"),
    ],
)
def test_what_is_no_row_is_refused_by_its_field(text: bytes, code: str, param: str | None) -> None:
    with pytest.raises(RowRefused) as refused:
        parse_row(text, URL)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_rows_take_three_quarters_of_the_places_and_none_while_others_wait() -> None:
    assert [num_rows_at_once(places, 0) for places in (0, 1, 4, 32)] == [0, 1, 3, 24]
    assert num_rows_at_once(32, 1) == 0


def test_a_row_that_cannot_be_answered_is_asked_again_after_longer_and_longer() -> None:
    assert [back_off_s(tries, None) for tries in (1, 2, 3, 40)] == [1.0, 2.0, 4.0, 30.0]
    assert back_off_s(1, 7.0) == 7.0
