"""Who holds the slots, by values: names of worlds, and words for a notebook that others read."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.scheduling.holders import HeldWorld, find_world, holder, list_worlds
from jupyter_llmcloud.errors import NotFound, UsageError

A = HeldWorld(world_id="a1b2c3", owner="/home/me/one/train.ipynb", world_size=2)
B = HeldWorld(world_id="a1ffff", owner="/home/me/two/train.ipynb", world_size=1, run_id="r-1")
C = HeldWorld(world_id="c0ffee", owner="pid:77", world_size=4, ends_in_s=12.0)


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        ("/home/me/one/train.ipynb", "one/train.ipynb"),
        ("/train.ipynb", "train.ipynb"),
        ("train.ipynb", "train.ipynb"),
        ("pid:77", "process 77"),
        ("server:0123", "a run without a notebook"),
        ("", "somebody"),
    ],
)
def test_a_holder_is_named_without_an_absolute_path(owner: str, words: str) -> None:
    assert holder(owner) == words


@pytest.mark.parametrize(
    ("name", "world"),
    [("a1b2c3", A), ("a1b", A), ("one/train.ipynb", A), ("/home/me/two/train.ipynb", B), ("process 77", C), ("c0", C)],
)
def test_a_world_is_found_by_its_id_or_by_its_notebook(name: str, world: HeldWorld) -> None:
    assert find_world([A, B, C], name) is world


def test_what_names_several_worlds_or_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"names 2 worlds: 2 ranks of one/train.ipynb \(world a1b2c3\), 1 rank of two"):
        find_world([A, B, C], "train.ipynb")
    with pytest.raises(UsageError, match="names 2 worlds"):
        find_world([A, B, C], "a1")
    with pytest.raises(NotFound, match=r"no world 'ain.ipynb'. There are: 4 ranks of process 77"):
        find_world([A, B, C], "ain.ipynb")
    with pytest.raises(NotFound, match="There are none"):
        find_world([], "a1b2c3")


def test_what_a_world_does_is_said_and_the_words_for_who_waits_do_not_change_with_time() -> None:
    assert [world.state for world in (A, B, C)] == ["idle", "executes r-1", "unused, ends in 12 s"]
    assert "12" not in list_worlds([A, B, C])
    assert list_worlds([A] * 6).endswith("and 2 worlds more")
