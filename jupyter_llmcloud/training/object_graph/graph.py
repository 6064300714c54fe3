"""Objects that variables lead to, as a graph: every object once, under the first path by which it is reached.

What two variables share is one object of the graph, so it is one object again when it is restored; a cycle is no
trouble; views of one tensor lead to one region of memory. An object that was there when the training began keeps the
address that it had then, wherever it has moved to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from jupyter_llmcloud.training.object_graph.digest import Identity, digest, identity
from jupyter_llmcloud.training.object_graph.dispatch import kind_of
from jupyter_llmcloud.training.object_graph.kinds import SIMPLE, CannotSave, Kind, name_of
from jupyter_llmcloud.training.object_graph.memory import Region

_TOLD = (dict, list, tuple)
GRADIENT = "<gradient>"
_LONG = 160  # characters of an address, from where on a number takes the place of the path

# What is to be done about an object that cannot be saved, by what leads to it; the first that leads there counts. What
# holds something of ANY or MAY that cannot be saved is left as the cell makes it; of MAY only little is saved.
MUST, LOSES, ANY, MAY = "must be saved", "loses its value", "is saved if it can be", "is saved if it is small"


@dataclass(slots=True)
class Entry:
    """An object of a graph.

    Attributes:
        address: its name in the graph.
        need: MUST, LOSES (what leads to it is written before it is read), ANY (it belongs to a library) or MAY (nothing
            of the cell mentions it).
        head, items: what it consists of: plain data; plain values, and [address] for other objects.
        refusal: why it cannot be saved.
    """

    value: Any
    address: str
    kind: Kind
    need: str
    transient: bool
    head: Any = None
    items: list[Any] = field(default_factory=list)
    refusal: str = ""
    data: bytes | None = None

    @property
    def type_name(self) -> str:
        return name_of(type(self.value))

    def fingerprint(self) -> bytes:
        """Differs when what it consists of does; what is in its items has a fingerprint of its own."""
        if self.data is None:
            self.data = digest((self.kind.name, self.type_name, self.head, self.items))
        return self.data


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

    def __init__(self, known: Identities, skipped: Collection[int] = ()) -> None:
        self.roots: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.paths: dict[str, Any] = {}
        self._known = known
        self._skipped = skipped  # ids of objects that are fixed here: somebody else saves them
        self._addresses: dict[int, str] = {}
        self._regions: dict[tuple[int, int, str], Region] = {}
        self._queue: deque[Entry] = deque()
        self._kept: list[Any] = []  # an id must not be given to another object while it counts

    def add(self, address: str, value: Any, need: str = MUST) -> None:
        """A variable; the walk goes on from it."""
        if type(value) in SIMPLE:
            self.roots[address] = value
            return
        self.roots[address] = [self._visit(value, address, need, False)]
        while self._queue:
            self._split(self._queue.popleft())

    def _visit(self, value: Any, path: str, need: str, transient: bool) -> str:
        if isinstance(value, Region) and len(value):
            value = self._regions.setdefault((value.start, len(value), value.device), value)
        if len(path) > _LONG:
            path = f"…{len(self._addresses)}"
        self.paths.setdefault(path, value)
        if (address := self._addresses.get(id(value))) is not None:
            return address
        address = self._known.address_of(value) or path
        if address in self.entries or (address == path and not self._is_free(path, value)):
            address = self._another(address)
        self._addresses[id(value)] = address
        self._kept.append(value)
        kind = kind_of(value)
        # A list that an object makes to tell of itself is not there for others; a function in it is.
        transient = isinstance(value, Region) or (transient and type(value) in _TOLD)
        self.entries[address] = entry = Entry(value, address, kind, need, transient)
        if id(value) not in self._skipped:
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
            simple = type(child) in SIMPLE
            entry.items.append(
                child
                if simple
                else [self._visit(child, entry.address + suffix, entry.need, transient or entry.transient)]
            )
        self._kept.append(children)

    def add_gradients(self, others: Collection[int]) -> None:
        """The gradients of tensors that are trained, which are attributes of theirs; not those of `others`."""
        for entry in list(self.entries.values()):
            value = entry.value
            if not isinstance(value, torch.Tensor) or not value.is_leaf or not value.requires_grad:
                continue
            if value.grad is not None and id(value) not in others:
                self.add(f"{entry.address}{GRADIENT}", value.grad)

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
