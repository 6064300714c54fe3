"""Which ranks a world has, by values: what is needed after a death, a broken group or a wish for another size."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.run.membership import Drop, ForkRanks, JoinGroup, Membership, Renumber, Replace, Restore
from jupyter_llmcloud.errors import WorldError


def running(size: int = 3, generation: int = 4) -> Membership:
    return Membership(size, generation, is_started=True)


def test_a_world_in_order_needs_nothing() -> None:
    assert running().repair() == []
    assert running().repair(has_store=False) == [], "the store is used only when ranks meet"


def test_a_world_that_was_taken_over_starts_all_its_ranks_and_restores_them() -> None:
    world = Membership(2)
    assert world.start() == [ForkRanks((0, 1)), JoinGroup(0)], "a new world has nothing to restore"
    assert world.repair() == [ForkRanks((0, 1)), JoinGroup(0), Restore((0, 1))]
    assert world.repair(has_store=False) == world.repair(), "its ranks get a store with their start"


def test_dead_ranks_are_replaced_in_a_new_generation_and_restored() -> None:
    world = running()
    assert world.died(2)
    assert world.died(0)
    assert world.repair() == [Replace((0, 2)), JoinGroup(5), Restore((0, 2))]


def test_a_broken_group_is_renewed_though_every_rank_lives() -> None:
    world = running()
    world.must_renew = True
    assert world.repair() == [Replace(()), JoinGroup(5), Restore(())]


@pytest.mark.parametrize("dead", [True, False])
def test_without_the_store_ranks_cannot_meet_again_and_the_way_out_is_said(dead: bool) -> None:
    world = running()
    if dead:
        world.died(1)
    else:
        world.must_renew = True
    with pytest.raises(WorldError, match="%world restart"):
        world.repair(has_store=False)


def test_a_generation_is_never_joined_twice_also_when_it_failed() -> None:
    world = running()
    world.must_renew = True
    world.joining(5)
    assert world.repair()[1] == JoinGroup(6)
    world.joining(6)
    world.joined()
    assert world.repair() == []


def test_a_new_process_that_dies_while_it_is_started_is_replaced_again() -> None:
    world = running()
    world.died(1)
    world.replacing((1,))
    world.died(1)
    world.joining(5)
    assert world.repair()[0] == Replace((1,))


def test_ranks_that_have_never_met_are_all_started_anew() -> None:
    world = Membership(2)
    world.joining(0)
    world.died(1)
    assert world.repair()[0] == ForkRanks((0, 1))
    world.start_anew()
    world.joining(0)
    world.joined()
    assert world.repair() == []


def test_ranks_that_could_not_be_replaced_are_still_dead_beside_those_that_died_meanwhile() -> None:
    world = running()
    world.died(1)
    world.replacing((1,))
    world.died(0)
    world.not_replaced((1,))
    assert world.repair()[0] == Replace((0, 1))


def test_a_smaller_world_ends_its_highest_ranks() -> None:
    assert running().resize(1) == [Drop(1), JoinGroup(5)]


def test_a_larger_world_starts_and_restores_only_the_new_ranks() -> None:
    assert running().resize(5) == [ForkRanks((3, 4)), JoinGroup(5), Restore((3, 4))]


def test_a_world_of_the_wanted_size_keeps_its_group() -> None:
    assert running().resize(3) == []


def test_the_end_of_a_rank_that_was_dropped_is_nobodys_death() -> None:
    world = running()
    world.size = 2
    assert not world.died(2)
    assert world.repair() == []


def test_a_world_that_lost_an_agent_goes_on_with_the_ranks_that_stay_under_new_numbers() -> None:
    world = running(4)
    world.died(0)
    world.died(2)
    assert world.reshape([0], 0) == [Renumber({1: 0, 2: 1, 3: 2}), Replace((1,)), JoinGroup(5), Restore((1,))]
    world.renumbered({1: 0, 2: 1, 3: 2})
    assert (world.size, world.dead, world.must_renew) == (3, {1}, True)


def test_a_world_may_lose_and_gain_members_in_one_new_group() -> None:
    world = running(2)
    world.died(0)
    assert world.reshape([0], 2) == [Renumber({1: 0}), ForkRanks((1, 2)), JoinGroup(5), Restore((1, 2))]
    assert running(2).reshape([], 1) == [ForkRanks((2,)), JoinGroup(5), Restore((2,))]
    assert running(2).reshape([], 0) == []


def test_a_world_with_nobody_left_is_started_anew_with_what_there_is() -> None:
    world = running(3)
    for rank in world.ranks:
        world.died(rank)
    assert world.reshape([0, 1, 2], 2) == [ForkRanks((0, 1)), JoinGroup(0), Restore((0, 1))]
    assert (world.size, world.dead) == (2, set())
    taken_over = Membership(3)
    assert taken_over.reshape([0, 1, 2], 1) == [ForkRanks((0,)), JoinGroup(0), Restore((0,))]


def test_without_the_store_nobody_can_be_left_out_and_the_way_out_is_said() -> None:
    with pytest.raises(WorldError, match="%world restart"):
        running().reshape([1], 0, has_store=False)
