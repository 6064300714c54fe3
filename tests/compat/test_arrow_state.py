"""With pyarrow, which datasets brings, pandas keeps texts in arrays of Arrow: they are saved and put back as others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from tests.support.object_graphs import Names, resumed

pyarrow = pytest.importorskip("pyarrow")


def frame() -> pd.DataFrame:
    return pd.DataFrame({"a": [0.0] * 9000, "b": ["x"] * 9000, "c": pd.Categorical(["u", "v"] * 4500)})


CHANGES: dict[str, Callable[[Names], Any]] = {
    "one text": lambda names: names["value"].loc.__setitem__((8889, "b"), "y"),
    "a text that is missing": lambda names: names["value"].loc.__setitem__((3, "b"), None),
    "a category": lambda names: names["value"].loc.__setitem__((1, "c"), "u"),
    "another frame": lambda names: names.update(value=names["value"][names["value"].index % 3 == 0]),
    "a row more": lambda names: names["value"].loc.__setitem__(9000, [1.0, "z", "v"]),
    "nothing": lambda names: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_texts_of_a_frame_are_as_they_were(change: Callable[[Names], Any]) -> None:
    again, before = resumed(lambda: {"value": frame()}, change)
    assert "pyarrow" in repr(getattr(before["value"]["b"].array, "_pa_array", "pyarrow").__class__)
    pd.testing.assert_frame_equal(again["value"], before["value"])


ARRAYS: dict[str, Callable[[], Any]] = {
    "an array": lambda: pyarrow.array([1, None, 3]),
    "a part of one": lambda: pyarrow.array(["a", "b", "c", "d"])[1:3],
    "an array in chunks": lambda: pyarrow.chunked_array([["a"], ["b", None]]),
    "an empty one": lambda: pyarrow.array([], pyarrow.string()),
    "one of lists": lambda: pyarrow.array([[1, 2], None, []]),
    "a dictionary": lambda: pyarrow.array(["a", "b", "a"]).dictionary_encode(),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_an_array_that_takes_the_place_of_another_is_there_after_a_resume(make: Callable[[], Any]) -> None:
    again, before = resumed(lambda: {"value": pyarrow.array([7])}, lambda names: names.update(value=make()))
    assert type(again["value"]) is type(before["value"])
    assert again["value"].equals(before["value"])
