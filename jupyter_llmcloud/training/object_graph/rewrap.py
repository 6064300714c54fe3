"""A saved graph as it would be had its models been wrapped as they are now: another plan wraps other models.

What a model holds has one address below `model.module` where DistributedDataParallel wraps it, and another one where
nothing does. The addresses of a saved graph are written anew, a wrapper is left out or put in, and all that was saved
of a model, its plain attributes too, finds its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from jupyter_llmcloud.training.object_graph.graph import Graph
from jupyter_llmcloud.training.object_graph.kinds.base import name_of

_WRAPPER = name_of(DistributedDataParallel)
_INNER = ".module"


def rewrapped(saved: dict[str, Any], live: Graph) -> dict[str, Any]:
    """Roots and nodes of a saved graph; `live` is the graph of what is there."""
    for address in [at for at, node in saved["nodes"].items() if node["type"] == _WRAPPER]:
        if not isinstance(live.paths.get(address), DistributedDataParallel):
            saved = _without(saved, address)
    for path in [at for at, value in live.paths.items() if isinstance(value, DistributedDataParallel)]:
        node = saved["nodes"].get(path)
        if node is not None and node["kind"] == "module" and node["type"] != _WRAPPER:
            saved = _with(saved, path)
    return {**saved, "nodes": {address: _as_spread_now(node, live) for address, node in saved["nodes"].items()}}


def _as_spread_now(node: dict[str, Any], live: Graph) -> dict[str, Any]:
    """A parameter is restored with its model: here it is what it is, a tensor that is cut or one that is whole."""
    found = live.paths.get(node.get("path", ""))
    if not isinstance(found, torch.nn.Parameter):
        return node
    return {"kind": live.entry_of(found).kind.name, "type": name_of(type(found)), "changed": False,
            "known": node["known"], "path": node["path"], "must": node.get("must", True)}  # fmt: skip


def _without(saved: dict[str, Any], wrapper: str) -> dict[str, Any]:
    inner = wrapper + _INNER
    nodes = {address: node for address, node in saved["nodes"].items() if address != wrapper}
    return _renamed({**saved, "nodes": nodes}, lambda at: wrapper + at[len(inner) :] if _is_below(at, inner) else at)


def _with(saved: dict[str, Any], path: str) -> dict[str, Any]:
    inner = path + _INNER
    roots, training = saved["roots"], saved["nodes"][path].get("head", [True])[0]
    moved = _renamed(saved, lambda at: inner + at[len(path) :] if _is_below(at, path) else at)
    wrapper = {"kind": "module", "type": _WRAPPER, "changed": False, "known": True, "path": path, "must": True,
               "head": [training, [], [], [], ["module"]], "items": [[inner]], "whole": False}  # fmt: skip
    same = {at: root for at, root in roots.items() if root["value"] == [path]}
    return {"roots": {**moved["roots"], **same}, "nodes": {**moved["nodes"], path: wrapper}}


def _is_below(address: str, top: str) -> bool:
    return address == top or (address.startswith(top) and address[len(top)] in ".[<")


def _renamed(saved: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    def reference(value: Any) -> Any:
        return [rename(value[0])] if type(value) is list else value

    def of_node(node: dict[str, Any]) -> dict[str, Any]:
        new = {**node, "items": [reference(item) for item in node["items"]]} if "items" in node else dict(node)
        if "path" in new:
            new["path"] = rename(new["path"])
        return with_ids(new)

    def with_ids(holder: dict[str, Any]) -> dict[str, Any]:
        return {**holder, "ids": {n: rename(at) for n, at in holder["ids"].items()}} if "ids" in holder else holder

    return {
        "roots": {at: with_ids({**root, "value": reference(root["value"])}) for at, root in saved["roots"].items()},
        "nodes": {rename(address): of_node(node) for address, node in saved["nodes"].items()},
    }
