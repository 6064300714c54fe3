"""What a run shows below its cell, by values: an area that remembers, time as an argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.output.blocks import Block
from jupyter_llmcloud.magics.output.cell_output import MAX_WAIT_S, CellOutput

VIEW = "the live view"


class Area:
    """What a notebook would show; `actions` is how it came about."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, str]] = []
        self.actions: list[str] = []
        self._clears = False

    def write(self, kind: str, text: str) -> None:
        self._put("text", text)

    def show(self, data: Mapping[str, Any], metadata: Mapping[str, Any], display_id: str, update: bool) -> None:
        text = str(data["text/plain"])
        if update:
            self.actions.append("update")
            self.shown = [(key, text if key == display_id else old) for key, old in self.shown]
        else:
            self._put(display_id, text)

    def clear(self, wait: bool) -> None:
        self.actions.append("clear")
        self._clears = wait
        if not wait:
            self.shown = []

    def _put(self, key: str, text: str) -> None:
        if self._clears:
            self.shown, self._clears = [], False
        self.shown.append((key, text))

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.shown)


def make(**options: Any) -> tuple[CellOutput, Area]:
    area = Area()
    return CellOutput("run", area, lambda: area.write("stdout", VIEW), **options), area


def said(text: str, *ranks: int) -> Block:
    return Block("stdout", text, ranks)


def clear(*ranks: int, wait: bool = True) -> Block:
    return Block("clear_output", "", ranks, record={"wait": wait})


def drawn(text: str, *ranks: int, update: bool = False, ids: Mapping[int, str] | None = None) -> Block:
    record = {"kind": "display", "data": {"text/plain": text}, "update": update}
    label = f"[{','.join(map(str, ranks))}]"
    return Block("display", text, ranks, label, record, display_ids=ids or {})


def test_a_figure_that_follows_a_figure_takes_its_place_and_nothing_else_moves() -> None:
    output, area = make()
    output.add_view()
    for number in range(5):
        output.add([clear(0, 1), drawn(f"figure {number}", 0, 1)], now=number)
    output.finish(9.0)
    assert area.text == "[0,1]\nfigure 4"
    assert area.actions == ["update"] * 4


def test_the_rest_is_shown_again_when_text_is_cleared() -> None:
    output, area = make()
    area.write("stdout", VIEW)
    output.add_view()
    output.add([said("theirs\n", 1), said("mine\n", 0)], 0.0)
    output.add([clear(0), said("mine again\n", 0)], 1.0)
    assert area.text == f"{VIEW}theirs\nmine again\n"


def test_what_several_ranks_said_goes_when_all_of_them_have_cleared() -> None:
    output, area = make()
    output.add([said("both\n", 0, 1), clear(0), said("a\n", 0)], 0.0)
    output.tick(1.0)
    assert area.text == "both\na\n"
    output.add([clear(1), said("b\n", 1)], 2.0)
    assert area.text == "a\nb\n"


def test_clearing_with_wait_waits_for_more_and_without_wait_does_not() -> None:
    output, area = make()
    output.add([said("stays\n", 0), clear(0)], 0.0)
    output.finish(9.0)
    assert area.text == "stays\n"
    output, area = make()
    output.add([said("goes\n", 0), clear(0, wait=False)], 0.0)
    output.finish(9.0)
    assert area.text == ""


def test_a_fast_loop_is_shown_a_few_times_a_second_and_its_end_at_once() -> None:
    output, area = make()
    for number in range(1_000):
        output.add([clear(0), said(f"{number}\n", 0)], now=number / 1_000)
    assert area.actions.count("clear") <= 6
    output.finish(1.0)
    assert area.text == "999\n"


def test_a_long_page_is_shown_again_less_often_but_soon_enough() -> None:
    output, area = make()
    output.add([said("x" * 150_000, 1)], 0.0)
    sent = 0
    for number in range(1_000):
        before = len(area.actions)
        output.add([clear(0), said(f"{number}\n", 0)], now=number / 100)
        sent += 150_000 * (len(area.actions) - before)
    assert sent <= 5_500_000
    deadline = output.next_deadline()
    assert deadline is not None and deadline - 9.99 <= MAX_WAIT_S


def test_an_update_is_shown_in_place_and_the_newest_of_many_wins() -> None:
    output, area = make()
    ids = {0: "a", 1: "b"}
    output.add([drawn("0 %", 0, 1, ids=ids)], 0.0)
    for number in range(1, 101):
        output.add([drawn(f"{number} %", 0, 1, update=True, ids=ids)], now=number / 1_000)
    output.finish(1.0)
    assert area.text == "[0,1]\n100 %"
    assert len(area.actions) <= 3


def test_a_rank_that_updates_alone_gets_a_display_of_its_own() -> None:
    output, area = make()
    output.add([drawn("same", 0, 1, ids={0: "a", 1: "b"}), said("after\n", 0)], 0.0)
    output.add([drawn("mine", 0, update=True, ids={0: "a"})], 1.0)
    output.tick(2.0)
    assert area.text == "[0]\nmine[1]\nsameafter\n"
    output.add([drawn("yours", 1, update=True, ids={1: "b"})], 3.0)
    output.finish(4.0)
    assert area.text == "[0]\nmine[1]\nyoursafter\n"


def test_an_update_of_what_was_never_shown_is_left_alone() -> None:
    output, area = make()
    output.add([drawn("x", 0, update=True, ids={0: "unknown"})], 0.0)
    output.finish(1.0)
    assert area.text == ""


def test_a_display_of_an_earlier_cell_may_be_updated() -> None:
    first, area = make()
    first.add([drawn("then", 0, ids={0: "kept"})], 0.0)
    later = CellOutput("later", area, lambda: None)
    later.add([drawn("now", 0, update=True, ids={0: "kept"})], 0.0)
    assert area.text == "[0]\nnow"


def test_where_nothing_can_be_cleared_everything_is_shown() -> None:
    output, area = make(can_clear=False)
    output.add([said("a\n", 0), clear(0), said("b\n", 0)], 0.0)
    assert area.text == "a\nb\n"
    output.add([drawn("same", 0, 1, ids={0: "a", 1: "b"}), drawn("mine", 0, update=True, ids={0: "a"})], 1.0)
    assert area.text == "a\nb\n[0,1]\nsame[0]\nmine"


def test_a_line_in_passing_is_not_written_again() -> None:
    output, area = make()
    output.add([Block("stdout", "\r50 %", (1,), passing=True), said("\rdone    \n", 1), said("mine\n", 0)], 0.0)
    assert area.text == "\r50 %\rdone    \nmine\n"
    output.add([clear(0), said("again\n", 0)], 1.0)
    assert area.text == "done    \nagain\n"
