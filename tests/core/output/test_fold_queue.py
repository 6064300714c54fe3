"""Which lines of ranks are shown as one, and when: by values."""

from __future__ import annotations

from jupyter_llmcloud.core.output.fold_queue import FoldQueue, Item


def line(rank: int, text: str, now: float) -> Item:
    return Item(rank, ("stdout", text), now, None, text)


def shown(queue: FoldQueue, now: float, final: bool = False) -> list[tuple[list[int], str]]:
    return [([item.rank for item in items], items[0].line) for items in queue.ready(now, final)]


def test_a_line_that_every_rank_has_written_is_ready_at_once() -> None:
    queue = FoldQueue([0, 1], hold_s=1.0)
    queue.add(line(1, "a", 0.0))
    assert shown(queue, 0.1) == []
    queue.add(line(0, "a", 0.1))
    assert shown(queue, 0.1) == [([0, 1], "a")]
    assert queue.next_deadline() is None


def test_a_line_of_one_rank_waits_for_the_others_until_its_time_is_over() -> None:
    queue = FoldQueue([0, 1], hold_s=1.0)
    queue.add(line(0, "mine", 5.0))
    assert queue.next_deadline() == 6.0 and queue.has(("stdout", "mine"))
    assert shown(queue, 5.9) == []
    assert shown(queue, 6.0) == [([0], "mine")]
    assert not queue.has(("stdout", "mine"))


def test_what_another_rank_wrote_before_the_common_line_is_shown_before_it() -> None:
    queue = FoldQueue([0, 1], hold_s=1.0)
    for item in (line(0, "both", 0.0), line(1, "first", 0.0), line(1, "both", 0.0)):
        queue.add(item)
    assert shown(queue, 2.0) == [([1], "first"), ([0, 1], "both")]


def test_an_item_waits_also_for_a_rank_that_has_joined_since() -> None:
    queue = FoldQueue([0], hold_s=1.0)
    queue.add_rank(1)
    queue.add(line(0, "a", 0.0))
    assert shown(queue, 0.0) == []
    assert shown(queue, 0.0, final=True) == [([0], "a")]
