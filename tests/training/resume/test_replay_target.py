"""How a cell is led back: what loops and passes over loaders have to do on the way to a saved position, by values."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.resume.loops.instrumentation import LOOP_FUNCTION, WHILE_FUNCTION
from jupyter_llmcloud.training.resume.loops.tracking import BodyStart, Loops, TrackedLoop, install
from jupyter_llmcloud.training.resume.replay_target import ReplayTarget


class Cursor:
    """Of a cell in which no loader has begun."""

    follows = True
    filename = "cell"

    def before_item(self, loop: Any) -> None: ...

    def begin_body(self, saved: dict[str, Any]) -> None: ...

    def body_start(self, with_rng: bool) -> BodyStart:
        return BodyStart({}, {}, 0, None)


def loop(number: int, began: int = 0, items: int = 9) -> TrackedLoop:
    return TrackedLoop(range(items), number, began, 0, Cursor())


def element(number: int, delivered: int, ordinal: int = 0, **loaders: int) -> dict[str, Any]:
    return {"loop": number, "ordinal": ordinal, "delivered": delivered, "loaders": loaders}


def position(kind: str, *path: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": kind, "path": list(path), "passes": {}, "trained": {}, "lengths": {}, **more}


def look_at_each_item_thrown_away(target: ReplayTarget, look: Callable[[], Any]) -> list[Any]:
    """What `look` finds inside the source of a loop that is led, once for each item that it had finished."""
    found: list[Any] = []

    def items() -> Iterator[None]:
        while True:
            found.append(look())
            yield

    outer = TrackedLoop(items(), 0, 0, 0, Cursor())
    led = target.enter(outer)
    assert led is not None
    target.skip(outer, led)
    return found


def here() -> bool:
    return True


def elsewhere() -> bool:
    return False


# --- loops ----------------------------------------------------------------------------------------------------------


def test_each_loop_of_the_path_throws_away_what_it_had_finished_and_the_last_one_arrives() -> None:
    target = ReplayTarget(position("loop", element(0, 3), element(1, 5)))
    outer, inner = loop(0), loop(1)
    assert target.enter(inner) is None  # not before the one round it
    first = target.enter(outer)
    assert first is not None
    assert not target.skip(outer, first)
    assert next(outer) == 2  # the one that it was at
    second = target.enter(inner)
    assert second is not None
    assert target.skip(inner, second)
    assert next(inner) == 5


def test_another_loop_of_the_same_number_is_not_entered() -> None:
    target = ReplayTarget(position("loop", element(0, 3, ordinal=1)))
    assert target.enter(loop(0, began=0)) is None
    assert target.enter(loop(0, began=1)) is not None


def test_a_loop_that_comes_for_another_item_has_missed_the_position() -> None:
    target = ReplayTarget(position("loop", element(0, 1), element(1, 1)))
    outer = loop(0)
    target.enter(outer)
    with pytest.raises(ResumeMissed, match="without passing the saved place"):
        target.enter(outer)


def test_loops_inside_the_source_of_one_that_is_led_are_left_alone() -> None:
    target = ReplayTarget(position("loop", element(0, 3)))
    inside = loop(1)
    assert look_at_each_item_thrown_away(target, lambda: target.enter(inside)) == [None] * 3


def test_a_pass_that_was_under_way_then_and_later_begins_anew() -> None:
    target = ReplayTarget(position("loop", passes={"new 1": {"ordinal": 2}}))
    assert target.begun_at(element(0, 1, a=1, **{"new 1": 3})) == {"a": 1, "new 1": 2}


# --- passes ---------------------------------------------------------------------------------------------------------


def test_passes_run_until_one_that_was_trained_on_and_then_deliver_nothing() -> None:
    target = ReplayTarget(position("loader", key="a", ordinal=2, trained={"a": [0, 1]}))
    assert target.plan("probe", 0, here) == ("run", 0)
    assert target.plan("a", 0, elsewhere) == ("nothing", 0)
    assert target.plan("evaluation", 0, elsewhere) == ("nothing", 0)


def test_the_saved_pass_goes_forward_where_its_batch_was_asked_for() -> None:
    target = ReplayTarget(position("loader", key="a", ordinal=2))
    assert target.plan("a", 2, elsewhere) == ("run", 0)
    assert target.plan("a", 2, here) == ("forward", 0)
    with pytest.raises(ResumeMissed, match="begun 4 passes"):
        target.plan("a", 3, here)


def test_the_saved_pass_of_a_trainer_goes_forward_wherever_the_code_is() -> None:
    target = ReplayTarget(position("training", key="a", ordinal=0))
    assert target.plan("a", 0, elsewhere) == ("forward", 0)
    assert target.is_reached_by("a", 0, elsewhere)
    assert not target.is_reached_by("b", 0, here)


def test_passes_within_items_that_are_thrown_away_stand_in_for_their_batches() -> None:
    saved = position(
        "loop",
        element(0, 3),
        lengths={"a": {0: 7}},
        passes={"b": {"ordinal": 0, "handed_out": 2}, "steps": {"ordinal": 0}},
    )
    target = ReplayTarget(saved)
    plans = look_at_each_item_thrown_away(
        target, lambda: [target.plan(key, 0, elsewhere) for key in ("a", "b", "c", "steps")]
    )
    assert plans[0] == [("stand in", 7), ("forward", 2), ("run", 0), ("run", 0)]


def test_the_code_is_there_when_its_loops_and_its_instructions_are() -> None:
    target = ReplayTarget(position("loader", element(0, 3), key="a", ordinal=0, where=[("train", "7f 12")]))
    path = [element(0, 1)]
    assert target.is_here(path, lambda: [("train", "7f 12")])
    assert not target.is_here(path, lambda: [("train", "7f 14")])
    assert not target.is_here([], lambda: [("train", "7f 12")])


def test_what_tracks_loops_is_pickled_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LOOP_FUNCTION, WHILE_FUNCTION):
        monkeypatch.setattr(builtins, name, None, raising=False)  # and taken away afterwards
    install(Cursor(), Loops())
    for name in (LOOP_FUNCTION, WHILE_FUNCTION):
        assert pickle.loads(pickle.dumps(getattr(builtins, name))) is getattr(builtins, name)
