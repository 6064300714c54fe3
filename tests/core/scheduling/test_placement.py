"""Where ranks go: all or none, on few hosts, with a word that helps when they do not fit."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.scheduling.placement import AgentSlots, default_num_ranks, place
from jupyter_llmcloud.errors import Busy, CapacityError, UsageError


def cpus(name: str, total: int = 8, free: int | None = None) -> AgentSlots:
    return AgentSlots(name, f"host-{name}", total, total if free is None else free)


def gpus(name: str, total: int, free: int | None = None) -> AgentSlots:
    return AgentSlots(name, f"host-{name}", total, total if free is None else free, has_gpus=True)


def allocations(num_ranks: int | None, *agents: AgentSlots) -> list[tuple[str, int]]:
    return [(allocation.address, allocation.num_ranks) for allocation in place(num_ranks, agents)]


def test_two_ranks_on_a_cpu_one_for_each_gpu() -> None:
    assert default_num_ranks([cpus("a")]) == 2
    assert default_num_ranks([cpus("a", 1)]) == 1
    assert default_num_ranks([gpus("a", 4), gpus("b", 4)]) == 8
    assert default_num_ranks([gpus("a", 1), cpus("b")]) == 1


def test_a_world_spans_as_few_hosts_as_it_can() -> None:
    assert allocations(3, cpus("a", 4), cpus("b", 8)) == [("b", 3)]
    assert allocations(10, cpus("a", 4), cpus("b", 8)) == [("b", 8), ("a", 2)]


def test_slots_that_hold_other_ranks_are_left_alone() -> None:
    assert allocations(3, cpus("a", 8, 1), cpus("b", 4)) == [("b", 3)]
    assert allocations(5, cpus("a", 8, 1), cpus("b", 4)) == [("b", 4), ("a", 1)]


def test_no_share_is_empty() -> None:
    assert allocations(2, cpus("a", 8, 0), cpus("b", 4, 2)) == [("b", 2)]


def test_more_than_the_cluster_could_ever_hold_is_refused_with_the_number_it_holds() -> None:
    with pytest.raises(CapacityError, match=r"-n 9: the cluster holds 8 ranks.*host-a: 8 CPU slots.*-n 8"):
        place(9, [cpus("a")])


def test_more_than_are_free_now_is_busy() -> None:
    with pytest.raises(Busy, match="3 of 8"):
        place(4, [cpus("a", 8, 3)])


def test_fewer_ranks_will_do_down_to_so_many() -> None:
    agents = [cpus("a", 8, 1), cpus("b", 4, 2)]
    assert [(found.address, found.num_ranks) for found in place(5, agents, at_least=1)] == [("b", 2), ("a", 1)]
    assert sum(found.num_ranks for found in place(2, agents, at_least=1)) == 2
    with pytest.raises(Busy, match="-n 4"):
        place(5, agents, at_least=4)
    with pytest.raises(CapacityError):
        place(20, agents, at_least=13)


def test_a_cluster_without_workers_says_so() -> None:
    with pytest.raises(CapacityError, match="no workers"):
        place(1, [])
    with pytest.raises(CapacityError, match="no workers"):
        place(None, [])


@pytest.mark.parametrize("number", [0, -1])
def test_a_world_has_at_least_one_rank(number: int) -> None:
    with pytest.raises(UsageError, match=f"-n {number}"):
        place(number, [cpus("a")])
