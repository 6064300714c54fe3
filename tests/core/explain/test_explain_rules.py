"""Tokens as they are shown, texts as they are spoilt, and what a table of that says: by values."""

from __future__ import annotations

import random

import pytest

from jupyter_llmcloud.core.explain.changes import OUTSIDE, TEXT_CHANGES, changed, shuffled_letters, swaps, typos
from jupyter_llmcloud.core.explain.robustness import (
    OutsideInputs,
    TriedInputs,
    compared,
    interval,
    outside_table,
    separation,
    sign_test,
    table,
    verdict,
    worst,
)
from jupyter_llmcloud.core.explain.spec import EXPLAIN, ExplainSpec
from jupyter_llmcloud.core.explain.tokens import columns, is_complete, placed, strengths, strongest, visible
from jupyter_llmcloud.core.options import parse
from jupyter_llmcloud.errors import UsageError

TEXT = "The for statement is used to iterate over the elements of a sequence."


def test_a_token_is_seen_whatever_it_is() -> None:
    assert visible(" the\n") == "·the⏎" and visible("") == "∅" and visible("\t") == "⇥"
    assert visible("\u202edrow\x00\ud800") == "�drow��"  # nothing turns the page round, or breaks the image
    assert len(visible("x" * 1000)) == 40


def test_wide_letters_take_two_columns_and_accents_none() -> None:
    assert columns("ab") == 2 and columns("北京") == 4 and columns("e\u0301") == 1


def test_lines_end_where_they_are_full_and_after_a_line_end() -> None:
    found = placed(["aaaa", "bbbb", "cc\n", "d"], width=10)
    assert [(token.line, token.column) for token in found] == [(0, 0), (0, 5), (1, 0), (2, 0)]


def test_strengths_keep_signs_and_zeros() -> None:
    assert strengths([1.0, -2.0, 0.0]) == [0.5, -1.0, 0.0] and strengths([0.0]) == [0.0] and strengths([]) == []
    assert strongest([0.1, -3.0, 0.0, 2.0], 3) == [1, 3, 0]
    assert is_complete(0.009, 1.0) and not is_complete(0.02, 1.0) and is_complete(0.0005, 0.0)


@pytest.mark.parametrize("name", TEXT_CHANGES)
def test_the_same_seed_spoils_a_text_in_the_same_way(name: str) -> None:
    change = TEXT_CHANGES[name]
    first = changed([TEXT, TEXT], change, 3)
    assert first == changed([TEXT, TEXT], change, 3) and first[0] != TEXT
    assert changed(["", "7"], change, 3) == ["", "7"]  # there is nothing to spoil


def test_typos_hit_as_many_letters_as_they_say_and_swaps_keep_all_letters() -> None:
    text = "abcdefghij" * 20
    typed = typos(text, random.Random(0), 0.1)
    assert 0 < abs(len(typed) - len(text)) <= 20
    swapped = swaps(text, random.Random(0), 0.05)
    assert sorted(swapped) == sorted(text) and 4 <= sum(a != b for a, b in zip(text, swapped, strict=True)) <= 20
    assert sorted(shuffled_letters([text], 1)[0]) == sorted(text) and all(OUTSIDE)


def test_answers_are_compared_row_by_row() -> None:
    labels = [1, 1, 0, 0]
    row = compared("typos", [1, 0, 0, 1], [1, 1, 1, 1], labels)
    assert row == TriedInputs("typos", 4, 2, 1, 1, 2)
    assert compared("typos", [1, 0], [1, 1], None) == TriedInputs("typos", 2, num_other=1)
    found = worst([[1, 1, 0, 0], [1, 0, 0, 0]], labels)
    assert found is not None and (found.num_right, found.num_lost, found.num_other) == (3, 1, 1)
    assert worst([[1]], None) is None


def test_a_sign_test_and_an_interval_are_those_of_the_books() -> None:
    assert sign_test(0, 10) == pytest.approx(2 / 1024) and sign_test(5, 5) == 1.0 and sign_test(0, 0) == 1.0
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3) and interval(0, 0) == (0.0, 1.0)
    assert separation([1.0, 0.9], [0.1, 0.95]) == pytest.approx(0.75) and separation([1.0], []) is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (TriedInputs("c", 100, 80, 0, 0, 0), "the same answers"),
        (TriedInputs("c", 100, 78, 5, 3, 9), "no difference beyond chance"),
        (TriedInputs("c", 100, 60, 20, 0, 21), "loses 20 points"),
        (TriedInputs("c", 100, 60, 0, 20, 21), "gains 20 points"),
        (TriedInputs("c", 100, None, 0, 0, 7), "7% other answers"),
        (TriedInputs("c", 50, perplexity=9.0, num_worse=40, num_better=10), "harder to go on from"),
        (TriedInputs("c", 50, perplexity=9.0, num_worse=26, num_better=24), "no difference beyond chance"),
    ],
)
def test_a_verdict_says_no_more_than_chance_allows(row: TriedInputs, words: str) -> None:
    assert verdict(row) == words


def test_tables_begin_with_the_data_as_they_are() -> None:
    rows = table([TriedInputs("as they are", 100, 90), TriedInputs("capitals", 100, 50, 40, 0, 45)])
    assert rows[0] == ["as they are", "90.0%", "83% to 94%", "0.0%", "as they are"]
    assert rows[1][-2:] == ["45.0%", "loses 40 points"]
    outside = outside_table([OutsideInputs("the data", 10, 0.9, 9), OutsideInputs("code", 10, 0.9, 8, 0.55)])
    assert outside[1][2:] == ["80%", "0.55", "answered as surely as the data: its probabilities do not warn"]
    bits = outside_table([OutsideInputs("the data", 9, bits_per_byte=2.0), OutsideInputs("x", 9, bits_per_byte=5.0)])
    assert bits[1] == ["x", "5", "2.5 x as unlikely"]


def test_options_that_do_not_fit_together_are_refused_in_a_word() -> None:
    parsed = parse(EXPLAIN, ["m", "a", "text", "--new", "3"])
    assert parsed.arguments == ["m", "a", "text"] and parsed.new == 3
    with pytest.raises(UsageError, match="what is the model asked"):
        ExplainSpec.make({}).checked(False)
    with pytest.raises(UsageError, match="instead of an input"):
        ExplainSpec.make({"adversarial": "x"}).checked(True)
    with pytest.raises(UsageError, match="--label is not for --adversarial"):
        ExplainSpec.make({"adversarial": "x", "label": "y"}).checked(False)
    with pytest.raises(UsageError, match="--outside is for --adversarial"):
        ExplainSpec.make({"outside": "x"}).checked(True)
    with pytest.raises(UsageError, match="leave one out"):
        ExplainSpec.make({"answer": "x", "new": 2}).checked(True)
    with pytest.raises(UsageError, match="Choose one of integrated-gradients, ablation"):
        ExplainSpec.make({"method": "lime"})
