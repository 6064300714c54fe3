"""Which variables `%pull` brings into the notebook, and to which ranks `%push` brings some."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import jupyter_llmcloud as lc
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands import distribute


class _World:
    world_size = 2

    def pull(self, names: Sequence[str], rank: int = 0) -> dict[str, str]:
        return {name: f"{name} of rank {rank}" for name in names}


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribute, "_world", _World)


def test_a_variable_comes_from_the_rank_that_is_named() -> None:
    assert distribute.pull(["x", "y@1", "z@all"]) == {
        "x": "x of rank 0",
        "y": "y of rank 1",
        "z": ["z of rank 0", "z of rank 1"],
    }


def test_one_name_for_two_values_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'x' is named more than once.*x@all"):
        distribute.pull(["x@0", "y", "x@1"])


@pytest.mark.parametrize("where", ["2", "-1", "²", "one", ""])
def test_a_rank_that_is_not_there_is_refused(where: str) -> None:
    with pytest.raises(UsageError, match="a rank from 0 to 1, or all"):
        distribute.pull([f"x@{where}"])


def test_ranks_that_are_an_empty_word_are_not_all_of_them() -> None:
    with pytest.raises(UsageError, match="--ranks ''"):
        distribute.push(["x"], {"x": 1}, "")


def test_values_where_names_belong_are_refused_in_plain_words() -> None:
    with pytest.raises(UsageError, match=r"names of variables, as in lc.pull\('x'\), not 3"):
        lc.pull(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"values by name, as in lc.push\(lr=lr\), not 'lr'"):
        lc.push("lr")
