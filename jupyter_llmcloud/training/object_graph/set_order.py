"""Sets as they were: what `pop()` and a loop over a set deliver depends on more than its items.

A set goes through its table slot by slot. Where an item lies depends on the size of the table, which a set that has
shrunk does not tell, and on all that came before it. So the places are saved, and the table is made as it was. Where
this Python keeps sets in another way, or items have other hashes than they had, a set gets its items as they come.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_WORD = ctypes.sizeof(ctypes.c_ssize_t)
_FILL, _USED, _MASK, _TABLE, _FINGER = (2 * _WORD + _WORD * at for at in (0, 1, 2, 3, 5))  # behind the object's head
_SMALL, _MOST_SLOTS = 8, 1 << 22
_DUMMY = -1  # the hash of a slot whose item has gone, which no item has
Places = list[Any]  # slots, where pop() looks first, places of the items, places of those that have gone


def places(value: Any) -> Places | None:
    """Where the items of a set or frozenset lie, in plain values; None where that cannot be told."""
    if not IS_KNOWN or (slots := _word(value, _MASK).value + 1) > _MOST_SLOTS:
        return None
    table = _table(value)
    gone = table[:, 1] == _DUMMY
    lies = (table[:, 0] != 0) & ~gone
    at, of_gone = (np.flatnonzero(found).astype(np.int32).tobytes() for found in (lies, gone))
    return [slots, _word(value, _FINGER).value, at, of_gone]


def fill(value: set[Any], items: list[Any], there: Places | None) -> None:
    """Give a set these items, in these places."""
    set.clear(value)
    if IS_KNOWN and there is not None:
        _into_a_table(value, items, there[0])
        if _put(value, items, there):
            return
        set.clear(value)
    set.update(value, items)


def frozen(cls: type[frozenset[Any]], items: list[Any], there: Places | None) -> frozenset[Any]:
    """A frozenset of these items, in these places where its table is as large."""
    made = frozenset.__new__(cls, items)
    if IS_KNOWN and there is not None and items and not _put(made, items, there):
        return frozenset.__new__(cls, list(items))
    return made


def _into_a_table(value: set[Any], items: list[Any], slots: int) -> None:
    """Put items into an empty set whose table gets this size: that which all have that take over half as many."""
    half = slots // 2 - 1
    first = 1 << 55  # far from what people count with
    others = set(range(first, first + max(0, half - len(items)))).difference(items) if slots > _SMALL else set()
    set.update(value, {*items[:half], *others})
    for item in items[half:]:
        set.add(value, item)
    for other in others:  # difference_update() would make the table small
        set.discard(value, other)


def _put(value: Any, items: list[Any], there: Places) -> bool:
    """Move the items of a set to these places; False where they could not be found there."""
    slots, finger, at, of_gone = there
    at, of_gone = np.frombuffer(at, np.int32), np.frombuffer(of_gone, np.int32)
    table = _table(value)
    lies = (table[:, 0] != 0) & (table[:, 1] != _DUMMY)
    if len(table) != slots or int(lies.sum()) != len(items) or len(at) != len(items):
        return False
    hashes = dict(zip(*table[lies].T.tolist(), strict=True))  # by where an item is in memory
    if any(id(item) not in hashes for item in items):
        return False
    table[:] = 0
    table[of_gone] = _GONE, _DUMMY
    table[at] = [(id(item), hashes[id(item)]) for item in items] if items else 0
    _word(value, _FILL).value = len(items) + len(of_gone)
    _word(value, _FINGER).value = finger
    return all(item in value for item in items)


def _word(value: Any, offset: int) -> ctypes.c_ssize_t:
    return ctypes.c_ssize_t.from_address(id(value) + offset)


def _table(value: Any) -> np.ndarray:
    """Of (item, hash) by slot; the memory of the set itself."""
    slots = _word(value, _MASK).value + 1
    words = (ctypes.c_ssize_t * (2 * slots)).from_address(_word(value, _TABLE).value)
    return np.ctypeslib.as_array(words).reshape(slots, 2)


def _look() -> tuple[bool, int]:
    """Whether sets are kept as this module takes it, and what stands where an item has gone."""
    known = set(range(100))
    known.discard(5)
    known.pop()
    words = [_word(known, offset).value for offset in (_FILL, _USED, _MASK, _FINGER)]
    if words != [100, 98, 511, 1]:
        return False, 0
    table = _table(known)
    items = [[id(item), item] for item in range(6, 100)]
    is_known = table[6:100].tolist() == items and table[5, 1] == _DUMMY and table[0, 0] == table[5, 0]
    return is_known, int(table[5, 0])


IS_KNOWN, _GONE = _look()
