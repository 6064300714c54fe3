"""What two ranks did, compared by values."""

from __future__ import annotations

from jupyter_llmcloud.core.preflight.findings import (
    LEFT,
    LOADER,
    LOADER_END,
    POINT,
    PROBLEM,
    TOGETHER,
    RankAct,
    RankStory,
    findings,
    is_stuck,
    wait_for_each_other,
)


def _together(what: str, line: int, shape: str = "", ended: bool = True) -> RankAct:
    return RankAct(TOGETHER, what, f"Cell In[1], line {line}", shape, ended=ended)


def test_ranks_that_agree_have_nothing_found() -> None:
    story = RankStory([_together("all_reduce()", 3, "float32 [2]")], "it has come to the end of the cell")
    assert findings({0: story, 1: story}) == [] and not is_stuck({0: story, 1: story})


def test_a_collective_that_one_rank_never_enters_is_named_with_its_line() -> None:
    waiting = RankStory([_together("barrier()", 5, ended=False)])
    over = RankStory([], "it has come to the end of the cell")
    (found,) = findings({0: waiting, 1: over})
    assert found.startswith("Cell In[1], line 5: rank 0 waits in barrier(), which rank 1 never enters")
    assert is_stuck({0: waiting, 1: over})


def _point(what: str, line: int, ended: bool = False) -> RankAct:
    return RankAct(POINT, what, f"Cell In[1], line {line}", ended=ended)


def test_ranks_that_receive_from_each_other_first_are_named_with_both_lines() -> None:
    stories = {0: RankStory([_point("recv()", 3)]), 1: RankStory([_point("send()", 4, True), _point("recv()", 6)])}
    (found,) = findings(stories)
    assert found.startswith("Cell In[1], line 3: rank 0 waits in recv(), and rank 1 in recv() at Cell In[1], line 6.")
    assert wait_for_each_other(stories) and not is_stuck(stories)


def test_what_is_on_its_way_is_no_finding() -> None:
    pairs = [("send()", "recv()"), ("recv()", "send()")]
    for one, other in pairs:
        assert not findings({0: RankStory([_point(one, 3)]), 1: RankStory([_point(other, 4)])})
    computing = RankStory([_together("backward()", 9, ended=False)])
    assert not wait_for_each_other({0: RankStory([_point("recv()", 3)]), 1: computing})
    over = RankStory([_point("recv()", 3, True)], "it has come to the end of the cell")
    assert not findings({0: over, 1: over})


def test_what_another_rank_never_sends_is_named() -> None:
    stories = {0: RankStory([_point("recv()", 3)]), 1: RankStory([], "it has come to the end of the cell")}
    (found,) = findings(stories)
    assert "rank 0 waits in recv(), which rank 1 never answers: it has come to the end of the cell." in found


def test_a_rank_that_may_still_come_is_waited_for() -> None:
    assert not is_stuck({0: RankStory([_together("barrier()", 5, ended=False)]), 1: RankStory()})


def test_different_collectives_shapes_and_batches_are_named() -> None:
    ends = [RankStory([_together("all_reduce()", 3)]), RankStory([_together("barrier()", 7)])]
    assert "while rank 1 enters barrier() at Cell In[1], line 7" in findings(dict(enumerate(ends)))[0]
    shapes = [RankStory([_together("all_reduce()", 3, shape)]) for shape in ("float32 [3]", "float32 [4]")]
    assert "float32 [3] on rank 0 and float32 [4] on rank 1" in findings(dict(enumerate(shapes)))[0]
    loaders = [_pass(batches, [_together("backward()", 3)]) for batches in (8, 9)]
    assert "rank 0 has 8 batches, rank 1 has 9" in findings(dict(enumerate(loaders)))[0]


def _pass(
    num_batches: int, inside: list[RankAct], behind: list[RankAct] | None = None, left: bool = False
) -> RankStory:
    """A pass over a loader, whose end is not there yet where nothing comes behind it."""
    entries = [RankAct(LOADER, str(num_batches), "Cell In[1], line 2", number=1), *inside]
    if behind is not None:
        entries += [RankAct(LOADER_END, "1", "Cell In[1], line 2", LEFT if left else "", number=7), *behind]
    return RankStory(entries, "it has come to the end of the cell")


def test_ranks_that_do_nothing_together_in_their_passes_may_have_other_numbers_of_batches() -> None:
    after = [_together("all_reduce()", 9)]
    assert findings({0: _pass(9, [], after), 1: _pass(8, [], after)}) == []


def test_who_has_more_batches_may_end_its_pass_after_as_many_steps_as_the_others() -> None:
    steps = [_together("backward()", 3)]
    assert findings({0: _pass(9, steps, [], left=True), 1: _pass(8, steps, [])}) == []
    (found,) = findings({0: _pass(9, steps, []), 1: _pass(8, steps, [], left=True)})
    assert "rank 0 has 9 batches, rank 1 has 8" in found


def test_what_one_rank_alone_finds_wrong_is_said_with_its_number() -> None:
    problem = RankStory([RankAct(PROBLEM, "an object cannot be pickled", "Cell In[1], line 4")])
    assert findings({0: problem, 1: RankStory()}) == ["Cell In[1], line 4: an object cannot be pickled (rank 0)."]


def test_a_group_of_one_of_them_concerns_nobody_else() -> None:
    own = RankStory([RankAct(TOGETHER, "barrier()", "Cell In[1], line 4", group=(0,))])
    assert not findings({0: own, 1: RankStory([], "it has come to the end of the cell")})
