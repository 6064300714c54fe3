"""The inputs of a batch: each a row of its own, whatever they come in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas
import pytest

from jupyter_llmcloud.client.batches import check_window, row_groups
from jupyter_llmcloud.errors import UsageError


def asked(inputs: Any, column: str | None = None) -> list[Any]:
    """The prompts that are asked for."""
    groups = list(row_groups("tiny", inputs, column, {"max_tokens": 3}))
    return [json.loads(line)["body"]["prompt"] for _, lines in groups for line in lines]


def test_rows_may_come_from_a_list_a_generator_or_a_data_frame() -> None:
    frame = pandas.DataFrame({"prompt": ["a", "b"], "text": ["c", "d"]})
    assert asked(["a", "b"]) == asked(iter(["a", "b"])) == asked(frame) == asked(frame["prompt"]) == ["a", "b"]
    assert asked(frame, "text") == ["c", "d"]


def test_rows_may_come_from_tables_of_dask_and_arrow() -> None:
    """They iterate over the names of their columns, over the columns, or over scalars of their own."""
    arrow, dask_frames = pytest.importorskip("pyarrow"), pytest.importorskip("dask.dataframe")
    frame = pandas.DataFrame({"prompt": ["a", "b", "c"], "text": ["d", "e", "f"], "number": [1, 2, 3]})
    table, parts = arrow.Table.from_pandas(frame), dask_frames.from_pandas(frame, npartitions=2)
    for inputs in (table, table.to_batches()[0], parts, table["prompt"], table["prompt"].chunk(0)):
        assert asked(inputs) == ["a", "b", "c"]
    assert asked(table, "text") == asked(parts, "text") == ["d", "e", "f"]


def test_rows_may_come_from_tables_of_polars() -> None:
    class Frame:  # as polars.DataFrame: it iterates over its columns
        def __iter__(self) -> Any:
            return iter([["a", "b"]])

        def to_dicts(self) -> list[dict[str, str]]:
            return [{"prompt": "a"}, {"prompt": "b"}]

    assert asked(Frame()) == ["a", "b"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("Hello", "this is one text"),
        (b"Hello", "this is one text"),
        (
            {"train": ["a"], "test": ["b"]},
            r"a mapping of 'train', 'test': give one of its values \(inputs\['train'\]\)",
        ),
        ({}, "a mapping of : give one of its values, or"),
        (None, "a list of inputs or a data set, not None"),
    ],
    ids=str,
)
def test_what_would_be_taken_apart_into_letters_or_names_is_refused(inputs: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asked(inputs)


def test_lists_and_numbers_that_parquet_and_numpy_have_made_their_own_are_sent() -> None:
    messages = np.array([{"role": "user", "content": "Hello"}], dtype=object)
    for inputs, column in (([{"messages": messages}], None), ([messages], None), ([{"chat": messages}], "chat")):
        [(route, [line])] = row_groups("tiny", inputs, column, {"max_tokens": np.int64(3)})
        body = json.loads(line)["body"]
        assert (route, body["messages"], body["max_tokens"]) == (
            "chat/completions", [{"role": "user", "content": "Hello"}], 3,
        )  # fmt: skip


def test_an_input_that_is_no_json_is_refused_by_its_number() -> None:
    with pytest.raises(UsageError, match="input 1 cannot be sent"):
        list(row_groups("tiny", ["a", {"prompt": object()}], None, {}))


def test_an_input_that_is_none_is_named_by_its_number() -> None:
    with pytest.raises(UsageError, match="input 1 is nan: it must be a text"):
        asked(pandas.Series(["a", None]))
    with pytest.raises(UsageError, match=r"input 1 has no column 'text'\. It has body"):
        asked([{"text": "a"}, {"body": "b"}], "text")


@pytest.mark.parametrize("window", ["x", "99d", "0h", "24h\n", "12345m", 24])
def test_a_time_for_the_answers_that_is_none_is_refused_by_how_it_is_written(window: Any) -> None:
    with pytest.raises(UsageError) as caught:
        check_window(window)
    assert str(caught.value) == f"window={window!r} is not possible: write it as in 24h or 30m."
    check_window("24h")
    check_window("30m")
