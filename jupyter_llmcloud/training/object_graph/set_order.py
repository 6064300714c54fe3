"""Sets in the order in which they were: what `pop()` and a loop over a set deliver depends on more than its items.

A set goes through its table slot by slot. Where an item lies depends on the size of the table, which a set that has
shrunk does not tell, and on what came before it. So a table of that size is made, and the items are put there in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

_ENTRY = 16  # bytes of a slot
_SMALL = 8  # slots of a set that has no table of its own
_MANY = 1_000_000  # slots: more would take long to be made


def num_slots(value: Any) -> int:
    """Of the table of a set or frozenset."""
    base = set if isinstance(value, set) else frozenset
    return max(_SMALL, (base.__sizeof__(value) - type(value).__basicsize__) // _ENTRY)


def fill(value: set[Any], items: list[Any], slots: int) -> None:
    """Give a set these items, so that it delivers them in this order wherever a set can."""
    for put in (_as_they_come, _backwards, _into_a_table, _together, _as_they_come):
        set.clear(value)
        put(value, items, slots)
        if all(one is other for one, other in zip(set.__iter__(value), items, strict=True)):
            return


def frozen(cls: type[frozenset[Any]], items: list[Any]) -> frozenset[Any]:
    """Likewise; made of a list, as most are."""
    for tried in (items, items[::-1]):
        made = frozenset.__new__(cls, tried)
        if all(one is other for one, other in zip(frozenset.__iter__(made), items, strict=True)):
            return made
    return frozenset.__new__(cls, items)


def _as_they_come(value: set[Any], items: list[Any], slots: int) -> None:
    set.update(value, items)


def _backwards(value: set[Any], items: list[Any], slots: int) -> None:
    set.update(value, items[::-1])


def _into_a_table(value: set[Any], items: list[Any], slots: int) -> None:
    """A set that takes over another one makes a table for it: others make it large, and leave it."""
    others = _others(items, slots, slots // 4)
    set.update(value, others)
    set.update(value, items)
    _leave(value, others)


def _together(value: set[Any], items: list[Any], slots: int) -> None:
    """In a table that is too full for both: at once."""
    others = _others(items, slots, max(0, slots // 2 - 1 - len(items)))
    set.update(value, {*items, *others})
    _leave(value, others)


def _leave(value: set[Any], others: Iterable[int]) -> None:
    for other in others:  # difference_update() would make the table small
        set.discard(value, other)


def _others(items: list[Any], slots: int, number: int) -> set[int]:
    """So many numbers that lie where none of the items does."""
    if slots > _MANY or slots <= _SMALL:
        return set()
    at_home = {hash(item) & (slots - 1) for item in items}
    free = (at for at in range(slots - 1, -1, -1) if at not in at_home)
    shift = slots * (1 + sys.hash_info.modulus // (4 * slots))  # far from the numbers that people count with
    return {shift + at for at, _ in zip(free, range(number), strict=False)}
