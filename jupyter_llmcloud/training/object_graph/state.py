"""Everything that the cell's own variables lead to: compared with how it was when the training began, and saved.

The cell is executed again when it is resumed, up to the saved place, so it makes again what has not changed since. What
has is saved, whole. What cannot be compared counts as changed, and what has changed and cannot be saved is refused by
name: a resumed cell would otherwise go on with less than it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from jupyter_llmcloud.training.object_graph.digest import digest, digest_bytes
from jupyter_llmcloud.training.object_graph.graph import ANY, LOSES, MAY, MUST, Entry, Graph, Identities
from jupyter_llmcloud.training.object_graph.kinds.base import Fixed
from jupyter_llmcloud.training.object_graph.memory import Region

SMALL = 4096 * 8  # bytes of memory that are saved whether they have changed or not
MAX_AT_ONCE = 64 << 20  # bytes that are compared while the training waits; more by the thread that writes
_FEW = 1000  # items of a container that is saved whether it has changed or not
_MANY = 100_000  # items of a container that is not mentioned
_WORDS = {"code": "function"}  # for what a class would not tell

CopyBytes = Callable[[str, torch.Tensor], torch.Tensor]
_OTHER = b"another one than at any time since then"
_COVERED = b"saved with the object that it belongs to"


@dataclass(frozen=True)
class Compare:
    """A region that is compared while the training goes on; `was` is its digest when the training began."""

    address: str
    region: Region
    was: bytes

    def has_changed(self) -> bool:
        """Whether it is another now."""
        return digest_bytes(self.region.bytes) != self.was


class ObjectState:
    """How the objects of a cell were, and what of them is saved.

    Attributes:
        known: the objects that there were when a pass over data began, by their addresses.
        later: regions that the next checkpoint looks at while it is written.
    """

    def __init__(self) -> None:
        self.known = Identities()
        self.later: list[Compare] = []
        self._first: dict[str, bytes] = {}  # fingerprints
        self._first_roots: dict[str, bytes] = {}
        self._early: set[str] = set()  # what there was when the training began
        self._early_roots: set[str] = set()
        self._in_body: set[str] = set()  # of it, what the bodies of loops had made by then that run round it
        self._is_in_same_bodies: Callable[[], bool] = lambda: True
        self._left = MAX_AT_ONCE
        self._changing: set[str] = set()  # regions that are known to change: they are not compared again

    @property
    def has_begun(self) -> bool:
        """Whether the beginning of the training has been seen."""
        return bool(self._first_roots)

    def remember(self, graph: Graph, covered: set[int]) -> None:
        """How what is new is now. The first time is when the training begins, or the outermost loop round it."""
        is_first = not self.has_begun
        for address, value in graph.roots.items():
            self._first_roots.setdefault(address, digest(value))
        for address, entry in graph.entries.items():
            if address not in self._first and not entry.refusal:
                self._first[address] = self._fingerprint(entry, covered)
            if not entry.transient:
                self.known.add(entry)
        if is_first:
            self._early, self._early_roots = set(self._first), set(self._first_roots)

    def remember_bodies(self, is_in_same_bodies: Callable[[], bool]) -> None:
        """What was remembered since the outermost loop began is made again too, as long as the same bodies run."""
        self._in_body = set(self._first) - self._early
        self._is_in_same_bodies = is_in_same_bodies
        self._early_roots = set(self._first_roots)

    def _fingerprint(self, entry: Entry, covered: set[int]) -> bytes:
        if isinstance(entry.value, Region):
            return _COVERED if entry.value.start in covered else digest_bytes(entry.value.bytes)
        return entry.fingerprint()

    # --- saving ---

    def take(self, graph: Graph, covered: set[int], copy: CopyBytes, limit: int) -> dict[str, Any]:
        """The roots and nodes of a graph as loadable values; raises NotPlain for what cannot be saved."""
        self.later, self._left = [], MAX_AT_ONCE
        if self._in_body and not self._is_in_same_bodies():
            self._in_body = set()  # another iteration has begun, which makes others
        reached = graph.reached()
        nodes = {at: self._node(entry, covered, copy, limit) for at, entry in graph.entries.items() if at in reached}
        for node in nodes.values():
            if node.get("items") or node.get("head"):
                _note_ids(node, graph, [node["head"], node["items"]])
        for root in self._not_whole(graph, nodes):
            del graph.roots[root]
        wanted = graph.under(graph.roots)
        roots = {
            address: {"value": value, "changed": self._first_roots.get(address) != digest(value),
                      "new": address not in self._first_roots, "early": address in self._early_roots}
            for address, value in graph.roots.items()
        }  # fmt: skip
        for saved_root in roots.values():
            _note_ids(saved_root, graph, [saved_root["value"]])
        return {"roots": roots, "nodes": {address: node for address, node in nodes.items() if address in wanted}}

    def _not_whole(self, graph: Graph, nodes: dict[str, Any]) -> list[str]:
        """Variables that need not be saved, and cannot be saved whole."""
        bad = {a for a, node in nodes.items() if graph.entries[a].need in (ANY, MAY) and not node.get("whole")}
        return [
            root
            for root, value in graph.roots.items()
            if type(value) is list and graph.entries[value[0]].need in (ANY, MAY) and graph.under([root]) & bad
        ]

    def _node(self, entry: Entry, covered: set[int], copy: CopyBytes, limit: int) -> dict[str, Any]:
        if isinstance(entry.value, Region):
            return self._memory(entry, covered, copy, limit)
        if entry.refusal:
            return self._unsaved(entry, entry.refusal)
        known = self._first.get(entry.address)
        changed = known != entry.fingerprint() or self._has_other_bytes(entry)
        is_another = entry.kind.name == Fixed.name and self.known.address_of(entry.value) != entry.address
        if (known is None or is_another) and not (entry.kind.made or entry.kind.led):
            return self._unsaved(entry, f"a {_WORDS.get(entry.kind.name, _class_of(entry))} that the training has made")
        if changed and (reason := entry.kind.refusal(entry.head)):
            return self._unsaved(entry, reason)
        node = {"kind": entry.kind.name, "type": entry.type_name, "changed": changed, "digest": entry.fingerprint(),
                "known": self.known.address_of(entry.value) == entry.address, "path": entry.path,
                "must": entry.need == MUST}  # fmt: skip
        size = _size(entry)
        leads_on = any(type(item) is list for item in entry.items)
        if not (changed or leads_on or entry.transient) and self._is_early(entry.address) and size > _FEW:
            return node
        return {**node, "head": entry.head, "items": entry.items, "whole": entry.kind.made and size <= _MANY}

    def _is_early(self, address: str) -> bool:
        return address in self._early or address in self._in_body

    def _has_other_bytes(self, entry: Entry) -> bool:
        region = entry.kind.unsaved_memory(entry.value)
        return region is not None and self._first.get(entry.items[0][0]) != digest_bytes(region.bytes)

    def _memory(self, entry: Entry, covered: set[int], copy: CopyBytes, limit: int) -> dict[str, Any]:
        region, address = entry.value, entry.address
        node = {"kind": "memory", "type": "", "head": [len(region), region.device], "items": [], "known": False,
                "path": entry.path, "must": entry.need == MUST}  # fmt: skip
        if region.start in covered:
            return {**node, "changed": False, "covered": True}
        known, size = self._first.get(address), len(region)
        if known is None and size > max(limit, SMALL) and entry.need in (LOSES, MAY):
            return self._unsaved(entry, f"{size:,} bytes made anew in every step")
        if entry.need == MAY and size > SMALL:
            return {**node, "changed": False}
        changed = known is None or not self._is_early(address) or address in self._changing
        if not changed and size > SMALL:
            self._left -= size
        if not changed and size > SMALL and self._left < 0:
            assert known is not None
            self.later.append(Compare(address, region, known))
            return {**node, "changed": False, "digest": known}
        if not changed and size > SMALL:
            changed = digest_bytes(region.bytes) != known
        if changed:
            self._changing.add(address)
        elif size > SMALL:
            return {**node, "changed": False, "digest": known}
        data = copy(f"memory {address}", region.as_tensor())
        return {
            **node,
            "changed": changed or self._first[address] != digest_bytes(data.numpy()),
            "bytes": data,
            "whole": True,
        }

    def note_changed(self, addresses: list[str]) -> None:
        """These regions were found to have changed while a checkpoint was written: the next one holds them."""
        self._changing.update(addresses)

    def note_restored(self, saved: dict[str, Any]) -> None:
        """What a checkpoint held of a training stays to be held: where the process is the one that made it, it may
        have been there when the training went on, as it is now.
        """
        changed = {address for address, node in saved["nodes"].items() if node["changed"]}
        self._early -= changed
        self._in_body -= changed
        self._changing |= changed
        self._first.update(dict.fromkeys(changed & self._first.keys(), _OTHER))
        roots = {address for address, root in saved["roots"].items() if root["changed"]}
        self._first_roots.update(dict.fromkeys(roots & self._first_roots.keys(), _OTHER))
        self._early_roots -= {address for address, root in saved["roots"].items() if not root["early"]}

    def _unsaved(self, entry: Entry, reason: str) -> dict[str, Any]:
        if entry.need == MUST:
            raise NotPlain(refusal(entry.address, reason))
        return {
            "kind": "lost",
            "type": "",
            "reason": reason,
            "changed": True,
            "head": None,
            "items": [],
            "known": False,
        }


def _note_ids(saved: dict[str, Any], graph: Graph, plain: list[Any]) -> None:
    """In the process that restores it an object has another id(), by which a cell may look for it."""
    if found := graph.ids_in(plain):
        saved["ids"] = found


def _class_of(entry: Entry) -> str:
    return entry.type_name.rpartition(":")[2]


def _size(entry: Entry) -> int:
    head = entry.head if type(entry.head) is list else ()
    return len(entry.items) + sum(len(part) for part in head if isinstance(part, list | str | bytes))


def refusal(address: str, reason: str) -> str:
    """Names what cannot be saved, and says what to do."""
    name = address.partition(" ")[2] or address
    return (
        f"{name!r} is or holds {reason}, which cannot be saved: a resumed cell would go on without it. Keep tensors, "
        "numbers, containers and objects of classes of your own in it; or give it state_dict() and load_state_dict(), "
        "and hand it over: run.checkpoint(name=...)"
    )
