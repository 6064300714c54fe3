"""Plans as they are written, the meshes that they ask for, and what they are refused for: by values."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.parallel.outer_schedule import OuterSchedule, fragments_of
from jupyter_llmcloud.core.parallel.plan import check, dispensable, normalised, parse_plan
from jupyter_llmcloud.errors import UsageError


@pytest.mark.parametrize(
    ("text", "world_size", "mesh", "data_ranks"),
    [
        ("ddp", 3, {"rank": 3}, 3),
        ("fsdp", 4, {"rank": 4}, 4),
        ("hsdp:2x3", 6, {"replicate": 2, "shard": 3}, 6),
        ("tp:4", 4, {"tp": 4}, 1),
        ("tp+fsdp", 6, {"shard": 3, "tp": 2}, 3),
        ("tp+fsdp:4", 8, {"shard": 2, "tp": 4}, 2),
        ("pipeline:2", 2, {"stage": 2}, 1),
        ("local-sgd:8", 4, {"rank": 4}, 4),
        ("diloco:8,bits=8", 4, {"rank": 4}, 4),
        ("async-ps:4,servers=2", 3, {"rank": 3}, 3),
    ],
)
def test_a_plan_says_how_ranks_are_laid_out(text: str, world_size: int, mesh: dict[str, int], data_ranks: int) -> None:
    plan = parse_plan(text)
    assert plan.mesh(world_size) == mesh
    assert plan.num_data_ranks(world_size) == data_ranks


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" FSDP ", "fsdp"),
        ("tp+fsdp", "tp+fsdp:2"),
        ("fsdp,wrap=A+B,reshard=yes", "fsdp,wrap=A+B"),
        ("diloco:30, fragments=2, outer-lr=0.70", "diloco:30,fragments=2"),
        ("async-ps, staleness=2, servers=2", "async-ps:8,servers=2"),
    ],
)
def test_a_plan_is_kept_as_it_would_be_written_again(text: str, written: str) -> None:
    assert normalised(text) == written
    assert parse_plan(written) == parse_plan(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fsd", "Did you mean fsdp"),
        ("", "Choose one of ddp, fsdp"),
        ("hsdp", "a number is missing"),
        ("hsdp:4", "GxR"),
        ("hsdp:0x2", "at least 1"),
        ("tp:1", "at least 2"),
        ("tp:²", "tp:N"),
        ("fsdp:2", "takes no number"),
        ("local-sgd:-1", "local-sgd:K"),
        ("async-ps:0", "at least 1"),
        ("async-ps:4,servers=0", "whole number of ranks"),
        ("ddp,bits=8", "it takes none"),
        ("fsdp,reshard=maybe", "yes or no, not 'maybe'"),
        ("diloco:4,fragments=5", "no room for 5 fragments"),
        ("diloco:4,fragments=2,delay=2", "until the next fragment"),
        ("diloco:4,outer-lr=nan", "outer-lr takes"),
        ("diloco:4,momentum=1", "0 to 0.999"),
    ],
)
def test_a_wrong_plan_is_refused_by_what_is_wrong_with_it(text: str, words: str) -> None:
    with pytest.raises(UsageError, match="--plan") as refused:
        parse_plan(text)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("plan", "compression", "ranks", "world_size", "words"),
    [
        ("hsdp:2x2", "", 3, 3, "needs 4 ranks, this world has 3. Start one with -n 4"),
        ("tp:2", "", 4, 4, "say --plan tp+fsdp:2"),
        ("tp+fsdp:2", "", 3, 3, "multiple of 2 ranks, 4 or more"),
        ("fsdp", "fp16", 2, 2, "is for --plan ddp"),
        ("diloco:2", "bf16", 2, 2, "diloco has bits=8"),
        ("fsdp", "", 1, 2, "Leave --ranks out"),
    ],
)
def test_a_world_that_does_not_fit_is_named(
    plan: str, compression: str, ranks: int, world_size: int, words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check(plan, compression, ranks, world_size)
    assert words in str(refused.value)
    check("", "powersgd", 1, 2)
    check("ddp", "", 1, 2)


def test_fragments_take_turns_within_a_round_and_are_applied_later() -> None:
    schedule = OuterSchedule(every=6, fragments=3, delay=1)
    steps = range(1, 13)
    assert [schedule.sent(step) for step in steps] == [[], [0], [], [1], [], [2]] * 2
    assert [schedule.applied(step) for step in steps] == [[], [], [0], [], [1], [], [2], [], [0], [], [1], []]
    assert OuterSchedule(every=1).applied(1) == [0]


@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 1, 5, 5], [100, 1, 1], [0, 0, 3], list(range(20))])
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_fragments_are_consecutive_and_none_is_empty(sizes: list[int], number: int) -> None:
    found = fragments_of(sizes, number)
    assert [at for fragment in found for at in fragment] == list(range(len(sizes)))
    assert len(found) == min(number, len(sizes)) and all(found)


def test_a_parameter_server_needs_its_ranks() -> None:
    with pytest.raises(UsageError, match="3 ranks are to hold the parameters, and this world has 2"):
        parse_plan("async-ps,servers=3").mesh(2)


@pytest.mark.parametrize(
    ("plan", "may_restart", "ranks"),
    [
        ("async-ps", False, {1, 2, 3}),
        ("async-ps:4,servers=2", False, {2, 3}),
        ("async-ps", True, set()),
        ("diloco:4", False, set()),
        ("", False, set()),
    ],
)
def test_only_workers_of_a_parameter_server_are_done_without(plan: str, may_restart: bool, ranks: set[int]) -> None:
    assert dispensable(plan, [0, 1, 2, 3], may_restart) == ranks
