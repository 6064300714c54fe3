"""Values of pandas that stand for no value, and those that hold such ones, come back from a checkpoint as they were."""

from __future__ import annotations

import zoneinfo
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow
import pytest

from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from tests.support.object_graphs import resumed

VALUES: dict[str, Callable[[], Any]] = {
    "NaT": lambda: pd.NaT,
    "NA": lambda: pd.NA,
    "a time in a zone": lambda: pd.Timestamp("2020-01-02 03:04", tz="Europe/Berlin"),
    "a zone": lambda: zoneinfo.ZoneInfo("Asia/Tokyo"),
    "a duration": lambda: pd.Timedelta(3, "s"),
    "a type of arrow": lambda: pyarrow.list_(pyarrow.timestamp("ns", "UTC")),
    "keys": lambda: {pd.NA: 1, pd.NaT: (pd.NaT, [pd.NA])},
}
COLUMNS: dict[str, Callable[[], Any]] = {
    "of objects": lambda: pd.Series([pd.NaT, pd.NA, None, 3, "x"], dtype=object),
    "of times": lambda: pd.Series([pd.Timestamp("2020"), pd.NaT]),
    "of times in a zone": lambda: pd.Series(pd.to_datetime(["2020", None]).tz_localize("Europe/Berlin")),
    "of durations": lambda: pd.Series([pd.Timedelta(1, "s"), pd.NaT]),
    "of whole numbers": lambda: pd.Series([1, None, 3], dtype="Int64"),
    "of arrow": lambda: pd.Series([1, None, 3], dtype="int64[pyarrow]"),
    "of texts": lambda: pd.Series(["a", None], dtype="string"),
    "of texts of Python": lambda: pd.Series(["a", None], dtype="string[python]"),
}


def equal(one: Any, other: Any) -> bool:
    if one is pd.NaT or one is pd.NA:
        return one is other
    if isinstance(one, dict):
        return equal(list(one), list(other)) and equal(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, pd.Series):
        return one.dtype == other.dtype and equal(one.tolist(), other.tolist())
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("make", [*VALUES.values(), *COLUMNS.values()], ids=[*VALUES, *COLUMNS])
@pytest.mark.parametrize("how", ["made in training", "kept", "appended"])
def test_it_comes_back_as_it_was(make: Callable[[], Any], how: str) -> None:
    first = {"made in training": lambda: None, "kept": make, "appended": list[Any]}[how]

    def train(names: dict[str, Any]) -> None:
        if how == "made in training":
            names["x"] = make()
        elif how == "appended":
            names["x"].append(make())

    found, wanted = resumed(lambda: {"x": first()}, train)
    assert equal(wanted["x"], found["x"])


def test_a_missing_value_that_takes_a_number_s_place_in_a_table() -> None:
    def train(names: dict[str, Any]) -> None:
        names["best"].loc[1, "when"] = pd.NaT
        names["best"].loc[0, "score"] = pd.NA

    def make() -> dict[str, Any]:
        rows = {"when": pd.to_datetime(["2020", "2021"]), "score": pd.Series([1, 2], dtype="Int64")}
        return {"best": pd.DataFrame(rows)}

    found, wanted = resumed(make, train)
    for name in wanted["best"]:
        assert equal(wanted["best"][name], found["best"][name])


def test_a_zone_without_a_name_is_refused() -> None:
    def train(names: dict[str, Any]) -> None:
        names["zone"] = zoneinfo.ZoneInfo.no_cache("Asia/Tokyo")

    with pytest.raises(NotPlain, match=r"'zone' is or holds a zoneinfo\.ZoneInfo without a name"):
        resumed(lambda: {"zone": None}, train)
