"""How revisions follow each other, and when a canary has to go, by values."""

from __future__ import annotations

import dataclasses

import pytest

from jupyter_llmcloud.core.serving.endpoint import rollout
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.serving.endpoint.rollout import Outcomes, why_unhealthy
from jupyter_llmcloud.errors import UsageError

ONE, TWO, THREE = Revision(1, "/one"), Revision(2, "/two", num_replicas=2), Revision(3, "/three")


def told(revisions: list[Revision]) -> list[tuple[int, str, int]]:
    return [(item.number, item.role, item.weight) for item in revisions]


def test_a_new_revision_takes_the_place_of_all_others_which_can_come_back() -> None:
    revisions = rollout.updated([ONE], TWO)
    assert told(revisions) == [(1, "retired", 0), (2, "stable", 100)]
    assert rollout.served(revisions) == (revisions[1],)
    back = rollout.rolled_back(revisions)
    assert told(back) == [(1, "stable", 100), (2, "retired", 0)]
    with pytest.raises(UsageError, match="no earlier revision"):
        rollout.rolled_back(back)
    assert rollout.next_number(back) == 3


def test_a_canary_gets_its_share_and_the_stable_one_the_rest() -> None:
    revisions = rollout.with_canary([ONE], TWO, 5)
    assert told(revisions) == [(1, "stable", 95), (2, "canary", 5)]
    assert told(rollout.rolled_back(revisions)) == [(1, "stable", 100), (2, "retired", 0)]
    assert told(rollout.with_canary(revisions, THREE, 10)) == [
        (1, "stable", 90), (2, "retired", 0), (3, "canary", 10),
    ]  # fmt: skip
    for percent in (0, 100, -1):
        with pytest.raises(UsageError, match="percent"):
            rollout.with_canary([ONE], TWO, percent)


def test_a_split_is_by_role_or_number_and_a_canary_with_everything_is_the_stable_one() -> None:
    revisions = rollout.with_canary([ONE], TWO, 5)
    assert told(rollout.split(revisions, {"stable": 50, "canary": 50})) == [(1, "stable", 50), (2, "canary", 50)]
    promoted = rollout.split(revisions, {"stable": 0, "canary": 100})
    assert told(promoted) == [(1, "retired", 0), (2, "stable", 100)]
    assert told(rollout.split(promoted, {"1": 20, "2": 80})) == [(1, "canary", 20), (2, "stable", 80)]
    back = rollout.split(promoted, {"1": 100})
    assert told(back) == [(1, "stable", 100), (2, "retired", 0)]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"stable": 50}, "make 50"),
        ({}, "make 0"),
        ({"stable": 150, "canary": -50}, "percent"),
        ({"stable": 90, "shadow": 10}, "no revision 'shadow'"),
        ({"stable": 90, "7": 10}, "no revision '7'"),
        ({"stable": 90, "1": 10}, "one revision twice"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(shares: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        rollout.split(rollout.with_canary([ONE], TWO, 5), shares)


@pytest.mark.parametrize("text", ["", "stable", "stable:", ":5", "stable:95,stable:5", "stable:-5", "stable:9.5"])
def test_a_split_that_is_written_wrongly_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="stable:95,canary:5"):
        rollout.parse_shares(text)
    assert rollout.parse_shares("stable:95, canary:5") == {"stable": 95, "canary": 5}


def test_a_shadow_answers_nothing_and_can_be_ended() -> None:
    revisions = rollout.shadowed([ONE], TWO)
    assert told(revisions) == [(1, "stable", 100), (2, "shadow", 0)]
    assert told(rollout.shadowed(revisions, None)) == [(1, "stable", 100), (2, "retired", 0)]
    assert told(rollout.shadowed(revisions, THREE))[1:] == [(2, "retired", 0), (3, "shadow", 0)]
    with pytest.raises(UsageError, match="answers requests already"):
        rollout.shadowed(revisions, revisions[0])


def test_a_revision_that_fails_is_withdrawn_with_the_reason_and_is_not_gone_back_to() -> None:
    canary = rollout.withdrawn(rollout.with_canary([ONE], TWO, 5), 2, "3 of 3 failed")
    assert told(canary) == [(1, "stable", 100), (2, "retired", 0)] and canary[1].note == "3 of 3 failed"
    update = rollout.withdrawn(rollout.updated([ONE], TWO), 2, "cannot be loaded")
    assert told(update) == [(1, "stable", 100), (2, "retired", 0)]
    with pytest.raises(UsageError, match="no earlier"):
        rollout.rolled_back(update)
    third = rollout.updated(update, THREE)
    assert told(rollout.rolled_back(third)) == [(1, "stable", 100), (2, "retired", 0), (3, "retired", 0)]
    assert rollout.withdrawn([ONE], 1, "nothing else is there") == [ONE]


def test_what_was_only_tried_is_not_gone_back_to() -> None:
    four = Revision(4, "/four")
    tried = rollout.rolled_back(rollout.with_canary([ONE], TWO, 5))
    tried = rollout.shadowed(rollout.shadowed(tried, THREE), None)
    updated = rollout.updated(tried, four)
    everything_but_one = [(2, "retired", 0), (3, "retired", 0), (4, "retired", 0)]
    assert told(rollout.rolled_back(updated)) == [(1, "stable", 100), *everything_but_one]
    assert told(rollout.withdrawn(updated, 4, "cannot be loaded")) == [(1, "stable", 100), *everything_but_one]
    promoted = rollout.split(rollout.with_canary([ONE], TWO, 5), {"canary": 100})
    assert told(rollout.rolled_back(rollout.updated(promoted, four)))[1] == (2, "stable", 100)
    before_this_was_kept = [dataclasses.replace(ONE, role="retired", weight=0), TWO]
    assert told(rollout.rolled_back(before_this_was_kept)) == [(1, "stable", 100), (2, "retired", 0)]
    again = rollout.shadowed(rollout.updated([ONE], TWO), ONE)  # the one before, beside the new one
    assert told(rollout.rolled_back(rollout.shadowed(again, None))) == [(1, "stable", 100), (2, "retired", 0)]


def test_scaling_leaves_the_canary_alone() -> None:
    scaled = rollout.scaled(rollout.with_canary([ONE], TWO, 5), 4)
    assert [item.num_replicas for item in scaled] == [4, 2]
    assert dataclasses.replace(scaled[0], num_replicas=1, weight=100) == ONE


@pytest.mark.parametrize(
    ("canary", "stable", "goes"),
    [
        ((3, 3), (100, 0), True),  # all that it was asked
        ((2, 2), (100, 0), False),
        ((9, 3), (100, 0), False),  # too few to tell
        ((10, 3), (100, 0), True),
        ((100, 5), (100, 0), False),  # 5 percent is not more than the 10 that are allowed
        ((100, 11), (100, 0), True),
        ((100, 30), (100, 16), False),  # not twice as many
        ((100, 33), (100, 16), True),
        ((3, 3), (3, 3), False),  # the other one fails as well
        ((0, 0), (0, 0), False),
    ],
)
def test_a_canary_goes_when_it_fails_clearly_more_than_the_stable_one(
    canary: tuple[int, int], stable: tuple[int, int], goes: bool
) -> None:
    assert bool(why_unhealthy(Outcomes(*canary), Outcomes(*stable))) is goes


def test_the_revision_before_keeps_its_replicas_for_a_while_where_that_is_asked_for() -> None:
    keeping = dataclasses.replace(TWO, keep_previous=60.0)
    revisions = rollout.updated([ONE], keeping, now=1000.0)
    assert told(revisions) == [(1, "previous", 0), (2, "stable", 100)]
    assert rollout.served(revisions) == tuple(revisions)
    assert rollout.expired(revisions, now=1059.9) is None
    over = rollout.expired(revisions, now=1060.0)
    assert told(over) == [(1, "retired", 0), (2, "stable", 100)] and over[0].kept_until is None
    for later in (revisions, over):
        assert told(rollout.rolled_back(later)) == [(1, "stable", 100), (2, "retired", 0)]
    assert told(rollout.withdrawn(revisions, 2, "it fails")) == [(1, "stable", 100), (2, "retired", 0)]
    third = rollout.updated(revisions, dataclasses.replace(THREE, keep_previous=60.0), now=1010.0)
    assert told(third) == [(1, "retired", 0), (2, "previous", 0), (3, "stable", 100)]


def test_replicas_that_take_the_new_weights_themselves_are_not_kept() -> None:
    keeping = dataclasses.replace(TWO, keep_previous=60.0, in_place_of=1)
    assert told(rollout.updated([ONE], keeping, now=1.0)) == [(1, "retired", 0), (2, "stable", 100)]


def test_what_a_canary_that_got_everything_has_replaced_is_kept_as_after_an_update() -> None:
    canary = rollout.with_canary([ONE], dataclasses.replace(TWO, keep_previous=60.0), 5)
    promoted = rollout.split(canary, {"canary": 100}, now=1000.0)
    assert told(promoted) == [(1, "previous", 0), (2, "stable", 100)] and promoted[0].kept_until == 1060.0
