"""Objects of a saved graph put into place: into those that are there, as far as they are; the others are made.

An object that is there and stands where the saved one stood is filled with the saved contents, so that everything that
knows it, also what no checkpoint can look into, sees them. No object takes two places, and no two objects take one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.object_graph import memory
from jupyter_llmcloud.training.object_graph.digest import digest_bytes
from jupyter_llmcloud.training.object_graph.graph import Entry, Graph
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, CannotSave, Kind, find, name_of
from jupyter_llmcloud.training.object_graph.kinds.dispatch import BY_NAME
from jupyter_llmcloud.training.object_graph.memory import Region

_MISSING = object()
# What these consist of is looked at when they are made.
_OF_WHOLE_PARTS = ("reduced", "frozenset", "numpy generator", "generic alias")
_KNOWN_EVERYWHERE = ("class", "function", "enum", "named")  # another one is never filled in their place
Node = dict[str, Any]


class NotSaved:
    """Stands for a value that was not saved, since the cell makes it anew before it is used; any use says so."""

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "_reason", reason)

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"this variable held {object.__getattribute__(self, '_reason')}, which is not part of a checkpoint, when "
            "the run was resumed. To keep it, hand it over: run.checkpoint(name=...)"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(item for item in (*args, *(kwargs or {}).values()) if isinstance(item, cls))._fail()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._fail()

    def __repr__(self) -> str:
        return f"<not saved: {object.__getattribute__(self, '_reason')}>"

    __bool__ = __len__ = __iter__ = __next__ = __getitem__ = __setitem__ = __call__ = __float__ = __int__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __neg__ = __contains__ = __index__ = __setattr__ = _fail
    __hash__ = None  # type: ignore[assignment]


class Restorer:
    """Puts a saved graph into place. `live` is the graph of what is there; of `nodes` only those wanted are used.

    `in_use`: ids of iterators that running loops draw from, which another one could not take the place of.

    Attributes:
        everything: also what had not changed is put back, as far as it was saved, and the rest is checked.
    """

    def __init__(self, nodes: dict[str, Node], live: Graph, everything: bool, in_use: Collection[int] = ()) -> None:
        self._in_use = in_use
        self.nodes = nodes
        self.live = live
        self.everything = everything
        self._done: dict[str, Any] = {}
        self._taken: set[int] = set()
        self._pending: list[tuple[str, Kind, Any, Node, bool]] = []
        self._ready: list[tuple[str, Kind, Any, Any, list[Any]]] = []  # of which all that they consist of is known
        # Who stood there when the training began has its place, and so has what was not saved: it can be nowhere else.
        self._reserved = {
            id(found): address for address, node in nodes.items()
            if (node["known"] or not _is_saved(node)) and (found := live.paths.get(address, _MISSING)) is not _MISSING
        }  # fmt: skip

    def value(self, saved: Any) -> Any:
        """The object for a saved value."""
        if type(saved) is not list:
            return saved
        [address] = saved
        if address not in self._done:
            found = self._object(address, self.nodes[address])
            self._done.setdefault(address, found)
        return self._done[address]

    def root(self, root: dict[str, Any]) -> Any:
        """The value of a variable."""
        ids, value = self._ids_of_now(root), self.value(root["value"])
        return ids.get(value, value) if type(value) is int else value

    def finish(self, below: Collection[str] | None = None) -> None:
        """Fill what was found or made: what has keys after what these consist of, what is told its state last.

        `below`: only what has these addresses. What is made of whole parts asks for them while others are being filled.
        """
        while (at := next((n for n, item in enumerate(self._pending) if _is_in(item[0], below)), None)) is not None:
            address, kind, target, node, is_kept = self._pending.pop(at)
            head, children = self._parts(node)
            if not (is_kept and self._has(target, children)):
                self._ready.append((address, kind, target, head, children))
        ready = [item for item in self._ready if _is_in(item[0], below)]
        self._ready = [item for item in self._ready if not _is_in(item[0], below)]
        ready.reverse()  # the inner before the outer
        for _, kind, target, head, children in sorted(ready, key=lambda item: _order(item[1])):
            kind.fill(target, head, children)

    def _parts(self, node: Node) -> tuple[Any, list[Any]]:
        """The head and the children of an object."""
        head, children = node["head"], [self.value(item) for item in node["items"]]
        if not (ids := self._ids_of_now(node)):
            return head, children
        return _exchanged(head, ids), [ids.get(item, item) if type(item) is int else item for item in children]

    def _ids_of_now(self, saved: dict[str, Any]) -> dict[int, int]:
        """The id() that objects have in this process, by those that they had."""
        return {number: id(self.value([at])) for number, at in saved.get("ids", {}).items() if at in self.nodes}

    def _below(self, node: Node) -> set[str]:
        """The addresses of everything that an object consists of."""
        found: set[str] = set()
        pending = [item[0] for item in node["items"] if type(item) is list]
        while pending:
            if (address := pending.pop()) not in found:
                found.add(address)
                pending += [item[0] for item in self.nodes[address].get("items", ()) if type(item) is list]
        return found

    def _there(self, address: str, node: Node) -> Any:
        """The object that stands where the saved one stood, if nobody else has it."""
        found = self.live.paths.get(address, _MISSING)
        if found is _MISSING and "path" in node and node["kind"] not in _KNOWN_EVERYWHERE:
            found = self.live.paths.get(node["path"], _MISSING)  # another one had its place when the training began
        is_reserved = not node["known"] and self._reserved.get(id(found), address) != address
        if found is _MISSING or id(found) in self._taken or is_reserved:
            return _MISSING
        if isinstance(found, Region):
            fits = node["kind"] == "memory" and [len(found), found.device] == node["head"]
            return found if fits and (found.is_writable or "bytes" not in node) else _MISSING
        if self.live.entry_of(found).transient:
            return _MISSING  # it was made to be looked at
        return found if name_of(type(found)) == node["type"] else _MISSING

    def _object(self, address: str, node: Node) -> Any:
        if node["kind"] == "lost":
            return NotSaved(node["reason"])
        kind, found = BY_NAME[node["kind"]], self._there(address, node)
        is_here = "items" in node and kind.name != "memory"
        if not is_here:
            return self._as_it_is(address, node, found)
        if kind.led and found is _MISSING:
            return self._missing(address, node)
        if found is not _MISSING and not (node["changed"] or self.everything or node["items"]):
            self._taken.add(id(found))
            return found
        if kind.filled:
            return self._filled(kind, address, node, found)
        if found is not _MISSING and not kind.kept and self._is_same([address], [self.live.entry_of(found).address]):
            self._taken.add(id(found))
            return found
        if kind.name == "reduced" and (id(found) in self._in_use or self._draws(address)):
            raise ResumeMissed(f"the iterator {_named(address)} is not where it was: it is drawn from beside a loop.")
        head, children = self._parts(node)
        if found is not _MISSING and kind.kept and self._is_like(found, kind, node, head, children):
            self._taken.add(id(found))
            kind.attach(found, head, children)
            return found
        return self._made(kind, address, node, head, children)

    def _draws(self, address: str) -> bool:
        """Whether an iterator draws from a pass over a loader, so that another one could not go on in its place."""
        pending, seen = [address], set[str]()
        while pending:
            node = self.nodes[pending.pop()]
            if node["kind"] in ("followed", "delivering generator"):
                return True
            if node["kind"] in ("reduced", "tuple"):
                inner = {item[0] for item in node.get("items", ()) if type(item) is list} - seen
                seen |= inner
                pending += inner
        return False

    def _as_it_is(self, address: str, node: Node, found: Any) -> Any:
        """Memory, or an object that has not changed."""
        if node["kind"] == "memory" and "bytes" in node and (node["changed"] or self.everything or found is _MISSING):
            region = found if found is not _MISSING else memory.allocate(*_on_this_device(node["head"]))
            region.fill(node["bytes"])
            self._taken.add(id(region))
            return region
        if found is _MISSING:
            return self._missing(address, node)
        self._check(address, node, found)
        self._taken.add(id(found))
        return found

    def _missing(self, address: str, node: Node) -> NotSaved:
        """Stands for an object that only the cell can make; it has not, and what will be read must be there."""
        if node.get("must", True):
            raise ResumeMissed(f"the checkpoint needs {_named(address)}, which the cell has not made again.")
        return NotSaved(f"a {node['type'].rpartition(':')[2]}")

    def _check(self, address: str, node: Node, found: Any) -> None:
        if not self.everything or "digest" not in node:
            return
        entry = self.live.entry_of(found)
        now = digest_bytes(found.bytes) if isinstance(found, Region) else entry.fingerprint()
        if now != node["digest"]:
            raise ResumeMissed(
                f"{_named(address)} had not changed since the training began, so it was not saved; but executed again, "
                "the cell has made another one. Seed the random numbers that it comes from, or read it from a file."
            )

    def _filled(self, kind: Kind, address: str, node: Node, found: Any) -> Any:
        if found is not _MISSING and (not hasattr(kind, "fits") or kind.fits(found, node["head"])):
            target = found
        elif not kind.made:
            return self._missing(address, node)
        else:
            target = kind.make(self._class(node), node["head"])
        is_kept = target is found and not node["changed"] and not self.everything
        self._taken.add(id(target))
        self._done[address] = target  # what it consists of may lead back to it
        self._pending.append((address, kind, target, node, is_kept))
        return target

    def _made(self, kind: Kind, address: str, node: Node, head: Any, children: list[Any]) -> Any:
        if not kind.made:
            return self._missing(address, node)
        if kind.name in ("tensor", "array") and isinstance(children[0], NotSaved):
            return children[0]  # its memory
        try:
            if kind.name in _OF_WHOLE_PARTS:
                self.finish(self._below(node))
            if address in self._done:  # it is part of itself
                return self._done[address]
            cls = None if kind.name in ("reduced", "named", "torch value", "dict view") else self._class(node)
            return kind.build(cls, head, children)
        except CannotSave as error:
            raise ResumeMissed(f"{_named(address)} cannot be restored: {error}.") from None

    def _class(self, node: Node) -> Any:
        cls = find(node["type"])
        if not isinstance(cls, type):
            raise ResumeMissed(
                f"the class {node['type'].partition(':')[2]} cannot be found: define it in the cell itself."
            )
        return cls

    def _is_like(self, found: Any, kind: Kind, node: Node, head: Any, children: list[Any]) -> bool:
        """Whether an object that cannot be filled consists of just these, but for what is attached to it."""
        entry: Entry = self.live.entry_of(found)
        if entry.refusal or entry.kind.name != kind.name:
            return False
        (there, items), (head, parts) = kind.own(entry.head, entry.items), kind.own(head, children)
        if there != head or len(items) != len(parts):
            return False
        if node["kind"] == "tensor" and node["changed"] and entry.head[-3:-2] == [True]:
            return False  # it has a graph (which is not asked for here: that could make it anew, and fail)
        return all(map(self._is_child, items, parts))

    def _has(self, target: Any, children: list[Any]) -> bool:
        """Whether an object that has not changed, in a cell that may have been edited, is best left alone.

        What it leads to has been put in place by itself; it is filled only when one of these became another object.
        """
        entry: Entry = self.live.entry_of(target)
        if entry.refusal or len(entry.items) != len(children):
            return True
        pairs = zip(entry.items, children, strict=True)
        return all(type(item) is not list or self.live.entries[item[0]].value is child for item, child in pairs)

    def _is_same(self, saved: Any, there: Any) -> bool:
        """Whether a saved object and one that is there tell the same of themselves."""
        if type(saved) is not list or type(there) is not list:
            return self._is_child(there, saved)
        node, entry = self.nodes[saved[0]], self.live.entries[there[0]]
        if not entry.transient and entry.kind.kept:
            return self.value(saved) is entry.value
        if node["kind"] == "memory":
            return self.value(saved) is entry.value
        alike = (node["kind"], node["type"], node.get("head")) == (entry.kind.name, entry.type_name, entry.head)
        items = node.get("items", [])
        return alike and len(items) == len(entry.items) and all(map(self._is_same, items, entry.items))

    def _is_child(self, item: Any, wanted: Any) -> bool:
        if type(item) is not list:
            return type(item) is type(wanted) and type(item) in SIMPLE and (item == wanted or item != item)
        return self.live.entries[item[0]].value is wanted


def _exchanged(plain: Any, ids: dict[int, int]) -> Any:
    if type(plain) is list:
        return [_exchanged(item, ids) for item in plain]
    return ids.get(plain, plain) if type(plain) is int else plain


def _is_saved(node: Node) -> bool:
    return ("bytes" if node["kind"] == "memory" else "items") in node


def _is_in(address: str, below: Collection[str] | None) -> bool:
    return below is None or address in below


def _order(kind: Kind) -> int:
    return 2 if not kind.kept else int(kind.name in ("dict", "set", "weak container"))


def _on_this_device(head: Any) -> tuple[int, str]:
    size, device = head
    is_there = not device.startswith("cuda") or torch.cuda.is_available()
    return size, device if is_there else "cpu"


def _named(address: str) -> str:
    return repr(address.partition(" ")[2] or address)
