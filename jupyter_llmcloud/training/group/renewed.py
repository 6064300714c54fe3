"""Groups that variables of the notebook hold when the process group of the world is renewed: made again, and put there.

Models, optimizers and meshes hold their groups for ever. Those that all their ranks still have are made again for the
same ranks, by the same names where torch counts them, and every object of Python that holds a former one gets the one
that stands for it. What torch holds in C++ is made again by its plan (see `parallel.ddp`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

_MANY = 10_000  # objects that are looked at together


class Description(NamedTuple):
    """What is needed to make a group again. Groups of this name are one group, on whichever rank."""

    name: str
    ranks: tuple[int, ...]
    backend: str
    text: str
    is_world: bool

    @property
    def order(self) -> tuple[int, str]:
        """The order in which they were made: torch counts them, or names them by a hash."""
        return (int(self.name), "") if self.name.isdigit() else (1 << 62, self.name)


class FormerGroups:
    """Those that this rank has left since it last shared a group that works with all others.

    Args:
        exempt: lists that keep former groups alive; nothing is put there.
    """

    def __init__(self, *exempt: list[Any]) -> None:
        self._exempt = exempt
        self._place = (-1, -1)
        self._groups: list[tuple[Description, Any]] = []
        self._timeouts: dict[str, timedelta] = {}  # by name; ranks of one group may have different ones

    def remember(self, rank: int, world_size: int) -> None:
        """The present groups are about to be left."""
        if (rank, world_size) != self._place:
            self._groups.clear()  # they are for other numbers
        self._place = (rank, world_size)
        for group in c10d._world.pg_map:
            about = _described(group)
            self._groups.append((about, group))
            self._timeouts |= _timeout(about.name, group)

    def renew(self) -> None:
        """Make again what can be, now that the world has a group that works. All ranks must call it."""
        groups, self._groups = self._groups, []
        timeouts, self._timeouts = self._timeouts, {}
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (self._place, {about for about, _ in groups}))
        every = {about: _made(about, timeouts.get(about.name)) for about in _shared(told)}
        made = {about: group for about, group in every.items() if group is not None}
        _count_on(about.name for _, own in told for about in own)
        swaps = [(former, made[about]) for about, former in groups if about in made]
        if swaps:
            put_in_place(swaps, self._exempt)
            _rename_in_meshes({about.name: group.group_name for about, group in made.items()})


def _described(group: Any) -> Description:
    ranks = sorted(c10d._world.pg_group_ranks[group].items(), key=lambda pair: pair[1])
    return Description(
        str(c10d._world.pg_names[group]),
        tuple(rank for rank, _ in ranks),
        str(c10d._world.pg_map[group][0]),
        str(getattr(group, "group_desc", "")),
        group is c10d.GroupMember.WORLD,
    )


def _timeout(name: str, group: Any) -> dict[str, timedelta]:
    for device in group._device_types:
        with contextlib.suppress(RuntimeError):  # a backend that is not there, or has no options
            return {name: group._get_backend(device).options._timeout}
    return {}


def _shared(told: list[tuple[tuple[int, int], set[Description]]]) -> list[Description]:
    """What every member has, by the number that it has now; in the order in which all ranks make them."""
    size = len(told)
    held = [own if place == (rank, size) else set() for rank, (place, own) in enumerate(told)]
    every = sorted(set().union(*held), key=lambda about: about.order)
    return [about for about in every if all(about in held[rank] for rank in about.ranks)]


def _made(about: Description, timeout: timedelta | None) -> Any:
    """The group that stands for a former one; None where this rank is none of its own."""
    if about.is_world:
        return c10d.GroupMember.WORLD
    is_counted = about.name.isdigit()
    if is_counted:
        c10d._world.group_count = int(about.name)
    group = dist.new_group(
        list(about.ranks),
        timeout=timeout,
        backend=about.backend,
        use_local_synchronization=not is_counted,
        group_desc=about.text,
    )
    return group if isinstance(group, dist.ProcessGroup) else None


def _count_on(names: Iterable[str]) -> None:
    """No group gets the name of a former one that was not made again: meshes that hold that name would use it."""
    numbers = [int(name) for name in names if name.isdigit()]
    c10d._world.group_count = max(c10d._world.group_count, *(number + 1 for number in numbers), 1)


# --- objects that hold them ---


def put_in_place(swaps: Iterable[tuple[Any, Any]], exempt: Iterable[Any] = ()) -> None:
    """Whatever holds the first of a pair holds the second from now on: attributes, containers, closures."""
    pending = {id(former): (former, present) for former, present in swaps}
    untracked = _untracked()
    kept = {id(container) for container in (*exempt, *untracked)}
    while pending:
        formers = [former for former, _ in pending.values()]
        kept |= {id(formers), *map(id, pending.values())}
        holders = [*_referrers(formers), *_unseen_holders(pending.keys(), untracked)]
        rebuilt: dict[int, tuple[Any, Any]] = {}
        for holder in [holder for holder in holders if id(holder) not in kept]:
            if type(holder) is tuple:  # cannot be changed: whoever holds it gets another one
                rebuilt[id(holder)] = (holder, tuple(_present(pending, value) for value in holder))
            elif not isinstance(holder, types.FrameType):
                _put(holder, functools.partial(_present, pending))
        pending = rebuilt


def _referrers(objects: Sequence[Any]) -> Iterator[Any]:
    """What holds any of them, as far as the garbage collector tells.

    Eight at a time, each an argument of its own: `gc.get_referrers(*objects)` finds the tuple that it is called with
    (from Python 3.13 on), which would be a holder of what is in it, and so on without an end.
    """
    for at in range(0, len(objects), 8):
        a, b, c, d, e, f, g, h = [*objects[at : at + 8], *[object()] * 8][:8]
        yield from gc.get_referrers(a, b, c, d, e, f, g, h)


def _unseen_holders(wanted: Collection[int], untracked: list[list[Any]]) -> Iterator[Any]:
    """What the garbage collector does not tell: frozen namespaces, dicts and tuples of nothing it looks after."""
    for namespace in _namespaces():
        if any(id(value) in wanted for value in list(namespace.values())):
            yield namespace
    for values in untracked:
        if not set(wanted).isdisjoint(map(id, gc.get_referents(*values))):
            yield from (value for value in values if any(id(inner) in wanted for inner in gc.get_referents(value)))


def _untracked() -> list[list[Any]]:
    """Dicts and tuples that the garbage collector has not to look after, many at a time.

    A group is no object that it looks after, and a dict of groups is none then either; what holds such a dict is. A
    notebook may hold millions of objects, the rows of a data set: nearly all is done in C.
    """
    objects = gc.get_objects()
    objects += _namespaces()
    found = []
    while objects:  # which is empty in the end: something in it may lead to it
        part = objects[-_MANY:]
        del objects[-_MANY:]
        values = gc.get_referents(*part)
        found.append([value for value in values if type(value) in (dict, tuple) and not gc.is_tracked(value)])
    return found


def _namespaces() -> list[dict[str, Any]]:
    return [vars(module) for module in list(sys.modules.values()) if type(module) is types.ModuleType]


def _present(pending: dict[int, tuple[Any, Any]], value: Any) -> Any:
    found = pending.get(id(value))
    return found[1] if found is not None else value


def _put(holder: Any, present: Callable[[Any], Any]) -> None:
    match holder:
        case dict():
            for key, value in list(holder.items()):
                if present(key) is not key:
                    dict.pop(holder, key)
                if present(key) is not key or present(value) is not value:
                    dict.__setitem__(holder, present(key), present(value))
        case list() | deque():
            for at, value in enumerate(holder):
                if present(value) is not value:
                    holder[at] = present(value)
        case set():
            for value in [value for value in holder if present(value) is not value]:
                holder.remove(value)
                holder.add(present(value))
        case types.CellType():
            holder.cell_contents = present(holder.cell_contents)
        case functools.partial():
            state: Any = holder.__reduce__()[2]
            function, args, kwargs, own = state
            holder.__setstate__((function, tuple(map(present, present(args))), kwargs, own))  # type: ignore[attr-defined]
        case _:
            _put_attributes(holder, present)


def _put_attributes(holder: Any, present: Callable[[Any], Any]) -> None:
    attributes = getattr(holder, "__dict__", None)
    if type(attributes) is dict:
        _put(attributes, present)
    for name in [name for kind in type(holder).__mro__ for name in _slots(kind)]:
        value = getattr(holder, name, None)
        if present(value) is not value:
            object.__setattr__(holder, name, present(value))


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _rename_in_meshes(names: dict[str, str]) -> None:
    names = {former: present for former, present in names.items() if former != present}
    meshes: list[Any] = [value for value in gc.get_objects() if names and type(value) is DeviceMesh]
    for mesh in meshes:
        mesh._dim_group_names = [names.get(name, name) for name in mesh._dim_group_names]
