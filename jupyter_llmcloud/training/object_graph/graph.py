"""Objects that variables lead to, as a graph: every object once, under the first path by which it is reached.

What two variables share is one object of the graph, so it is one object again when it is restored; a cycle is no
trouble; views of one tensor lead to one region of memory. An object that was there when the training began keeps the
address that it had then, wherever it has moved to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jupyter_llmcloud.training.object_graph.digest import Identity, digest, identity
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, CannotSave, Kind, name_of
from jupyter_llmcloud.training.object_graph.kinds.dispatch import STATEFUL_FOLLOWED, WRAPPER, kind_of
from jupyter_llmcloud.training.object_graph.memory import Region

_CONTAINERS = (dict, list, tuple)
GRADIENT = "<gradient>"
_LONG = 160  # characters of an address, from where on a number takes the place of the path
MAX_OBJECTS = 100_000  # of a cell; each costs some 20 µs at every checkpoint
_LEAST_ID = 1 << 32  # a number below is no address in memory

# What is to be done about an object that cannot be saved, by what leads to it; the first that leads there counts. What
# holds something of ANY or MAY that cannot be saved is left as the cell makes it; of MAY only little is saved.
MUST, LOSES, ANY, MAY = "must be saved", "loses its value", "is saved if it can be", "is saved if it is small"


@dataclass(slots=True)
class Entry:
    """An object of a graph.

    Attributes:
        address: its name in the graph.
        path: how it was reached first.
        need: MUST, LOSES (what leads to it is written before it is read), ANY (it belongs to a library) or MAY (nothing
            of the cell mentions it).
        head, items: what it consists of: plain data; plain values, and [address] for other objects.
        refusal: why it cannot be saved.
    """

    value: Any
    address: str
    path: str
    kind: Kind
    need: str
    transient: bool
    head: Any = None
    items: list[Any] = field(default_factory=list)
    refusal: str = ""
    data: bytes | None = None

    @property
    def type_name(self) -> str:
        """Under which its class is found again."""
        return name_of(type(self.value))

    def fingerprint(self) -> bytes:
        """Differs when what it consists of does; what is in its items has a fingerprint of its own."""
        if self.data is None:
            self.data = digest((self.kind.name, self.type_name, self.head, self.items))
        return self.data


class TooMany(CannotSave):
    """Variables lead to more objects than can be looked at."""


class Identities:
    """Which objects were there before, and under what address."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[str, Identity]] = {}
        self._by_address: dict[str, int] = {}

    def address_of(self, value: Any) -> str | None:
        """The address under which an object was known; None when it is new."""
        found = self._by_id.get(id(value))
        return found[0] if found is not None and found[1]() is value else None

    def add(self, entry: Entry) -> None:
        """Remember an object; it takes the place of another one of the same address."""
        if self.address_of(entry.value) is not None:
            return
        self._by_id.pop(self._by_address.get(entry.address, 0), None)
        self._by_id[id(entry.value)] = (entry.address, identity(entry.value))
        self._by_address[entry.address] = id(entry.value)

    def holds(self, address: str) -> bool:
        """Whether an object that was known under this address is alive."""
        found = self._by_id.get(self._by_address.get(address, 0))
        return found is not None and found[1]() is not None


class Graph:
    """Walks through objects, breadth first.

    Attributes:
        roots: by the address of a variable: a plain value, or [address].
        entries: by address.
        paths: the object to which each path leads.
    """

    def __init__(self, known: Identities, kinds: Mapping[int, Kind] | None = None) -> None:
        self.roots: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.paths: dict[str, Any] = {}
        self._known = known
        self._kinds = kinds or {}  # of objects that are looked at in another way here, by id
        self._addresses: dict[int, str] = {}
        self._regions: dict[tuple[int, int, str], Region] = {}
        self._queue: deque[Entry] = deque()
        self._kept: list[Any] = []  # an id must not be given to another object while it counts

    def add(self, address: str, value: Any, need: str = MUST) -> None:
        """A variable; the walk goes on from it."""
        if type(value) in SIMPLE:
            self.roots[address] = value
            return
        self.roots[address] = [self._visit(value, address, address, need, False)]
        while self._queue:
            self._split(self._queue.popleft())
            if len(self.entries) > MAX_OBJECTS:
                name = address.partition(" ")[2] or address
                raise TooMany(
                    f"the variables up to {name!r} lead to more than {MAX_OBJECTS:,} objects, too many to look at for "
                    "every checkpoint. Keep numbers in tensors or arrays, and rows in a data set"
                )

    def _visit(self, value: Any, path: str, now: str, need: str, transient: bool) -> str:
        """`path` begins with the address of what leads to the object, `now` with how that is reached now."""
        if isinstance(value, Region) and len(value):
            value = self._regions.setdefault((value.start, len(value), value.device), value)
        if len(path) > _LONG:
            path = f"…{len(self._addresses)}"
        if len(now) > _LONG:
            now = path
        self.paths.setdefault(path, value)
        if (address := self._addresses.get(id(value))) is not None:
            return address
        kind = self._kinds.get(id(value)) or kind_of(value)
        # What is led back is where it is, whatever else was there before.
        address = now if kind.led else self._known.address_of(value) or path
        if address in self.entries or (address == path and not kind.led and not self._is_free(path, value)):
            address = self._another(address)
        self._addresses[id(value)] = address
        self._kept.append(value)
        # A list that an object makes to tell of itself is not there for others; a function in it is.
        transient = isinstance(value, Region) or (transient and type(value) in _CONTAINERS)
        self.entries[address] = entry = Entry(value, address, now, kind, need, transient)
        self._queue.append(entry)
        return address

    def _is_free(self, path: str, value: Any) -> bool:
        return self._known.address_of(value) == path or not self._known.holds(path)

    def _another(self, address: str) -> str:
        number = 1
        while (found := f"{address}*{number}") in self.entries or self._known.holds(found):
            number += 1
        return found

    def _split(self, entry: Entry) -> None:
        try:
            entry.head, children = entry.kind.split(entry.value)
        except CannotSave as error:
            entry.refusal = str(error)
            return
        except Exception as error:
            entry.refusal = f"a {type(entry.value).__name__} ({type(error).__name__}: {error})"
            return
        transient = not entry.kind.kept
        for suffix, child in children:
            if type(child) in SIMPLE:
                entry.items.append(child)
                continue
            where = entry.address + suffix, entry.path + suffix
            entry.items.append([self._visit(child, *where, entry.need, transient or entry.transient)])
        self._kept.append(children)

    def add_gradients(self, others: Collection[int]) -> None:
        """The gradients of tensors that are trained, which are attributes of theirs; not those of `others`."""
        for entry in list(self.entries.values()):
            value = entry.value
            if not isinstance(value, torch.Tensor) or not value.is_leaf or not value.requires_grad:
                continue
            if value.grad is not None and id(value) not in others:
                self.add(f"{entry.address}{GRADIENT}", value.grad)

    def leave(self, values: Iterable[Any], kind: Kind) -> None:
        """These objects are saved in another way, as `kind` tells; what they consist of is left out."""
        for value in values:
            if (address := self._addresses.get(id(value))) is None:
                continue
            entry = self.entries[address]
            if entry.kind.name == "stateful" and not entry.refusal:  # what its state leaves out stays
                entry.kind, entry.items, entry.data = STATEFUL_FOLLOWED, entry.items[1:], None
            elif entry.kind not in (STATEFUL_FOLLOWED, WRAPPER):
                entry.kind, entry.head, entry.items, entry.refusal, entry.data = kind, [], [], "", None

    def ids_in(self, plain: Any) -> dict[int, str]:
        """The numbers in plain data that are the id() of an object that was reached, each with its address."""
        found: dict[int, str] = {}
        pending = [plain]
        while pending:
            for item in pending.pop():
                if type(item) is int:
                    if item > _LEAST_ID and (address := self._addresses.get(item)) is not None:
                        found[item] = address
                elif type(item) is list:
                    pending.append(item)
        return found

    def reached(self) -> set[str]:
        """The addresses of everything that a variable leads to."""
        return self.under(self.roots)

    def entry_of(self, value: Any) -> Entry:
        """The entry of an object that was reached."""
        return self.entries[self._addresses[id(value)]]

    def under(self, roots: Iterable[str]) -> set[str]:
        """The addresses of everything that these variables lead to."""
        found: set[str] = set()
        pending = [self.roots[root] for root in roots]
        while pending:
            value = pending.pop()
            if type(value) is list and value[0] not in found:
                found.add(value[0])
                pending += self.entries[value[0]].items
        return found
