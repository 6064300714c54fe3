"""A split between replicas is named with its first tensor; what may differ is no split."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.run.divergence import DivergenceCheck, ReplicaDigests, find_split


def held(*ranks: dict[str, str], buffers: bool = False) -> dict[int, ReplicaDigests]:
    return {n: ReplicaDigests(buffers=own) if buffers else ReplicaDigests(own) for n, own in enumerate(ranks)}


def test_the_first_tensor_in_the_models_order_is_named_with_the_ranks_that_are_fewer() -> None:
    alike = {"z": "1", "b": "2", "a": "3"}
    split = find_split(held(alike, {**alike, "b": "x", "a": "y"}, alike), {})
    assert split is not None
    assert (split.kind, split.name, split.ranks, split.others, split.num_tensors) == ("parameter", "b", (1,), (0, 2), 2)


def test_of_two_ranks_the_second_is_named() -> None:
    split = find_split(held({"w": "1"}, {"w": "2"}), {})
    assert split is not None and (split.ranks, split.others) == ((1,), (0,))


def test_only_ranks_with_the_same_shard_are_compared() -> None:
    shards = [{"w (shard 0)": "1"}, {"w (shard 1)": "2"}, {"w (shard 0)": "1"}, {"w (shard 1)": "3"}]
    split = find_split(held(*shards), {})
    assert split is not None and (split.name, split.ranks, split.others) == ("w (shard 1)", (3,), (1,))
    assert find_split(held(*shards[:3]), {}) is None


def test_a_buffer_that_follows_each_ranks_data_is_no_split_and_one_that_stands_still_is() -> None:
    first = held({"mean": "1", "mask": "m"}, {"mean": "2", "mask": "m"}, buffers=True)
    assert find_split(first, {}) is None
    assert find_split(held({"mean": "3", "mask": "m"}, {"mean": "4", "mask": "m"}, buffers=True), first) is None
    split = find_split(held({"mean": "5", "mask": "m"}, {"mean": "6", "mask": "x"}, buffers=True), first)
    assert split is not None and (split.kind, split.name, split.ranks) == ("buffer", "mask", (1,))


def test_random_numbers_alone_are_no_split_and_are_said_beside_one() -> None:
    def ranks(second: str) -> dict[int, ReplicaDigests]:
        drawn = {"torch": "1", "python": "1"}
        return {0: ReplicaDigests({"w": "1"}, rng=drawn), 1: ReplicaDigests({"w": second}, rng={**drawn, "torch": "2"})}

    assert find_split(ranks("1"), {}) is None
    split = find_split(ranks("2"), {})
    assert split is not None and split.rng == ("torch",)


def test_a_split_is_said_once_with_the_step_at_which_all_was_well() -> None:
    check = DivergenceCheck()
    assert check.look(10, held({"w": "1"}, {"w": "1"})) == ""
    said = check.look(20, held({"w": "2"}, {"w": "3"}))
    assert "step 20: parameter w is another one on rank 1 than on rank 0. They were alike at step 10." in said
    assert check.look(30, held({"w": "4"}, {"w": "5"})) == ""


def test_at_a_first_checkpoint_no_earlier_step_is_claimed() -> None:
    assert "first checkpoint" in DivergenceCheck().look(5, held({"w": "1"}, {"w": "2"}))


@pytest.mark.parametrize("digests", [{}, held({}, {}), held({"w": "1"}, {})])
def test_nothing_to_compare_is_nothing_to_say(digests: dict[int, ReplicaDigests]) -> None:
    assert DivergenceCheck().look(1, digests) == ""
