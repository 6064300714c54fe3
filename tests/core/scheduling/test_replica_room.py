"""Where a replica goes, by values."""

from __future__ import annotations

import dataclasses

import pytest

from jupyter_llmcloud.core.scheduling.replica_room import AgentRoom, ReplicaNeeds, place_replica, ranks_among
from jupyter_llmcloud.errors import Busy, CapacityError

GIB = 2**30
A = AgentRoom("a", "one", free_slots=8, num_cores=4, free_memory_bytes=8 * GIB)
B = AgentRoom("b", "two", free_slots=8, num_cores=4, free_memory_bytes=8 * GIB)


def test_a_replica_goes_where_the_fewest_are_and_one_that_states_nothing_always_fits() -> None:
    assert place_replica(ReplicaNeeds(), [dataclasses.replace(A, num_replicas=1), B]) == "b"
    full = dataclasses.replace(A, free_slots=0, num_ranks=8, free_memory_bytes=1)
    assert place_replica(ReplicaNeeds(), [full]) == "a"


def test_cores_that_were_promised_are_kept_beside_ranks_and_other_replicas() -> None:
    taken = dataclasses.replace(A, num_ranks=2, reserved_cores=1)
    assert place_replica(ReplicaNeeds(cores=1), [taken]) == "a"
    with pytest.raises(Busy, match=r"--cores 2: 1 of the 4 cores of one are free \(2 have ranks, 1 other replicas\)"):
        place_replica(ReplicaNeeds(cores=2), [taken])
    assert place_replica(ReplicaNeeds(cores=2), [taken, B]) == "b"


def test_agents_of_one_host_share_its_cores_and_memory() -> None:
    beside = dataclasses.replace(A, address="c", reserved_cores=3, promised_bytes=6 * GIB)
    with pytest.raises(Busy, match="--cores 2"):
        place_replica(ReplicaNeeds(cores=2), [A, beside])
    with pytest.raises(Busy, match="--memory 4GiB: 2GiB are free"):
        place_replica(ReplicaNeeds(memory_bytes=4 * GIB), [A, beside])


def test_more_than_any_host_has_is_refused_otherwise_than_more_than_is_free() -> None:
    with pytest.raises(CapacityError, match="--cores 5"):
        place_replica(ReplicaNeeds(cores=5), [A, B])
    with pytest.raises(CapacityError, match="no GPU"):
        place_replica(ReplicaNeeds(devices=1), [A])
    with pytest.raises(Busy):
        place_replica(ReplicaNeeds(memory_bytes=9 * GIB), [A])


def test_on_a_host_with_gpus_a_replica_has_one_unless_it_wants_none() -> None:
    gpus = AgentRoom("g", "gpu", free_slots=0, has_gpus=True, num_cores=8)
    with pytest.raises(Busy, match="1 GPU is asked for, 0 are free"):
        place_replica(ReplicaNeeds(), [gpus])
    assert place_replica(ReplicaNeeds(devices=0), [gpus]) == "g"
    assert place_replica(ReplicaNeeds(devices=1), [dataclasses.replace(gpus, free_slots=1)]) == "g"


def test_ranks_are_told_from_replicas_among_those_who_hold_slots() -> None:
    assert ranks_among({"0123": 2, "replica tiny-1": 1, "4567": 3}) == 5
