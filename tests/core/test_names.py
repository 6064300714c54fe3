"""Names, lists of ranks, durations and variables as users type them."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.names import (
    check_name,
    format_ranks,
    parse_duration,
    parse_ranks,
    parse_variables,
    run_id,
)
from jupyter_llmcloud.errors import UsageError


@pytest.mark.parametrize("name", ["a", "9", "pydoc-gpt", "v1.2_b", "x" * 128])
def test_a_good_name_is_returned(name: str) -> None:
    assert check_name(name, "--name") == name


@pytest.mark.parametrize("name", ["", "-a", ".hidden", "..", "a/b", "a b", "ä", "a\n", "x" * 129, "_a", "a\0"])
def test_a_bad_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(UsageError, match="not a valid name"):
        check_name(name, "--name")


def test_the_id_of_a_run_sorts_by_name_and_time_and_is_a_name() -> None:
    early, late = run_id("gpt", 0, "ab12"), run_id("gpt", 86_400, "0000")
    assert early == "gpt-19700101-000000-ab12"
    assert early < late
    assert check_name(run_id("x" * 128, 1e9, "ffff"), "run")


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("0", [0]), ("0,2-3", [0, 2, 3]), ("3, 1", [1, 3]), ("1-1", [1]), ("0-3,2", [0, 1, 2, 3]), (" 2 ", [2])],
)
def test_ranks_are_read(text: str, ranks: list[int]) -> None:
    assert parse_ranks(text, 4) == ranks


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a rank"),
        ("a", "'a' is not a rank"),
        ("0,,1", "not a rank"),
        ("-1", "not a rank"),
        ("3-1", "backwards"),
        ("4", "ranks 0-3"),
        ("2-9", "no rank 9"),
        ("1-", "not a rank"),
    ],
)
def test_bad_ranks_are_refused_with_the_reason(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_ranks(text, 4)


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2], [0, 2, 3, 7], [5], [1, 3, 5], [9, 10, 11, 13]])
def test_ranks_are_written_as_they_are_read(ranks: list[int]) -> None:
    assert parse_ranks(format_ranks(ranks), 20) == ranks


def test_neighbouring_ranks_are_written_as_a_range() -> None:
    assert format_ranks([3, 0, 2, 3]) == "0,2-3"
    assert format_ranks([9, 10, 11]) == "9-11"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("1.5m", 90)]
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "5x", "m", "1h30m", "inf", "1e3"])
def test_a_bad_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="30m"):
        parse_duration(text)


def test_variables_are_separated_by_commas() -> None:
    assert parse_variables("a, b,c", "--push") == ["a", "b", "c"]


@pytest.mark.parametrize(("text", "word"), [("", "expected names"), ("a.b", "'a.b'"), ("1x", "'1x'"), (",", "names")])
def test_what_is_no_variable_is_named(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_variables(text, "--push")
