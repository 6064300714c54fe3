"""The structure of the package, read from its sources: imports, folders, attributes, and who reaches through whom."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "jupyter_llmcloud"

MAX_LINES = 600
MAX_FILES = 12
MAX_ATTRIBUTES = 12

_DATA = "the part is a value that the parent holds (a record, settings, a format), not a partner with a life of its own"

# Each exception with its reason. A test fails when one is not needed any more.
EXCEPTIONS: dict[str, str] = {
    "Attempt: self._feed.record.artifacts": _DATA,
    "RunFollower: self.view": _DATA,
    "SweepDriver: self._work.spec": _DATA,
    "SweepDriver: self.board.record": _DATA,
    "RunWatch: self._follower": "a watch tells what its follower has read of one run, all of it values",
    "SharedColumns: self._follower": "a watch tells what its follower has read of one run, all of it values",
    "Rank: self.watchdog.collectives.state": _DATA,
    "RankDisplayHook: self.shell.compile.cell": "IPython makes the hook and gives it the shell alone",
    "LiveView: self.state.metrics": _DATA,
    "ViewState: self.metrics.progress.shown": _DATA,
}


def excepted(name: str) -> bool:
    """Whether an exception is made for it, or for what it begins with."""
    return any(name == key or name.startswith(f"{key}.") for key in EXCEPTIONS)


def unused_exceptions(names: Iterable[str]) -> list[str]:
    """The exceptions that nothing needs."""
    needed = list(names)
    return [key for key in EXCEPTIONS if not any(name == key or name.startswith(f"{key}.") for name in needed)]


@cache
def modules() -> dict[str, Path]:
    """The modules of the package by their dotted names; a package goes by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports() -> dict[str, set[str]]:
    """Which modules of ours a module imports: at its top, inside functions, and only for types."""
    known, found = modules(), defaultdict[str, set[str]](set)
    for name, path in known.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names if alias.name in known)
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                targets = (f"{node.module}.{alias.name}" for alias in node.names)
                found[name].update(target if target in known else str(node.module) for target in targets)
    return {name: targets - {name} for name, targets in found.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other."""
    reachable = {name: _reachable(name, edges) for name in edges}
    together = {
        frozenset({name, *(other for other in reachable[name] if name in reachable.get(other, ()))}) for name in edges
    }
    return sorted(sorted(circle) for circle in together if len(circle) > 1)


def _reachable(name: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(edges[name])
    while waiting:
        if (other := waiting.pop()) not in found:
            found.add(other)
            waiting.extend(edges.get(other, ()))
    return found


@cache
def files_per_folder() -> dict[str, int]:
    """How many modules lie in each folder, `__init__` not counted."""
    counts: defaultdict[str, int] = defaultdict(int)
    for path in modules().values():
        if path.name != "__init__.py":
            counts[str(path.parent.relative_to(REPOSITORY))] += 1
    return dict(counts)


@cache
def lines() -> dict[str, int]:
    """The length of each module."""
    return {str(path.relative_to(REPOSITORY)): len(path.read_bytes().splitlines()) for path in modules().values()}


@cache
def attributes() -> dict[str, int]:
    """How many attributes the methods of each class assign to `self`."""
    counts = {}
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                counts[f"{name}.{node.name}"] = len({target.attr for target in _assigned_to_self(node)})
    return counts


def _assigned_to_self(node: ast.ClassDef) -> Iterator[ast.Attribute]:
    for statement in ast.walk(node):
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and _is_self(part.value):
                    yield part


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@cache
def reaches() -> dict[str, list[str]]:
    """`self._parent.part.attribute`, where the parent and its part are instances of classes of ours, by module.

    What an attribute is, is told by the annotation of the argument that it was assigned from.
    """
    ours = {node.name for path in modules().values() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)}
    types = _attribute_types(ours)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                found[name] += sorted({*_reaches_of(node, types)})
    return {name: rows for name, rows in found.items() if rows}


def _attribute_types(ours: set[str]) -> dict[str, dict[str, str]]:
    """Class of ours -> its attribute -> the class of ours that this is an instance of; classes of one name as one."""
    types: dict[str, dict[str, str]] = {}
    for path in modules().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                types.setdefault(node.name, {}).update(_attribute_types_of(node, ours))
    return types


def _attribute_types_of(node: ast.ClassDef, ours: set[str]) -> Iterator[tuple[str, str]]:
    for name, annotation in _annotated(node):
        if (kind := ast.unparse(annotation)) in ours:
            yield name, kind
    for method in (part for part in node.body if isinstance(part, ast.FunctionDef)):
        arguments = {a.arg: ast.unparse(a.annotation) for a in method.args.args if a.annotation is not None}
        for attribute, value in _assignments(method):
            given = arguments.get(value.id, "") if isinstance(value, ast.Name) else ""
            made = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
            yield from ((attribute, kind) for kind in (given, made) if kind in ours)


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """The fields and the properties of a class, with their annotations."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id, part.annotation
        elif isinstance(part, ast.FunctionDef) and "property" in map(ast.unparse, part.decorator_list) and part.returns:
            yield part.name, part.returns


def _assignments(method: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """`self.attribute = value`."""
    for part in ast.walk(method):
        if isinstance(part, ast.Assign):
            target = part.targets[0]
            if isinstance(target, ast.Attribute) and _is_self(target.value):
                yield target.attr, part.value


def _reaches_of(node: ast.ClassDef, types: dict[str, dict[str, str]]) -> Iterator[str]:
    for part in ast.walk(node):
        chain: list[str] = []
        inner: ast.expr | None = part if isinstance(part, ast.Attribute) else None
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if inner is None or not _is_self(inner) or len(chain) < 3:
            continue
        parent = types.get(node.name, {}).get(chain[0])
        if parent is not None and chain[1] in types.get(parent, {}):
            yield f"{node.name}: self." + ".".join(chain[:3])


_ON_THE_WIRE = "one thing: there it lives, and protocol.http says what a response or an event tells of it"

# Names of public classes that several modules have, each with the reason why they are one thing all the same.
SHARED_NAMES: dict[str, str] = {
    "CheckpointSaved": "one thing: what an agent answers, and what the server passes on",
    "Endpoint": _ON_THE_WIRE,
    "KeyAlert": _ON_THE_WIRE,
    "KeyUsage": _ON_THE_WIRE,
    "LogRecords": "one thing: records on their way from a rank, and to a reader",
    "MetricRecords": "one thing: records on their way from a rank, and to a reader",
    "NewKey": _ON_THE_WIRE,
    "NotFinite": _ON_THE_WIRE,
    "Placement": "one thing: what an agent answers, and what the server passes on",
    "RankError": _ON_THE_WIRE,
    "RankVariables": "one thing: what a rank answers, and what the server passes on",
    "Replica": _ON_THE_WIRE,
    "Run": _ON_THE_WIRE,
    "ScaleCluster": "one thing: what the server is asked, and what it asks the cluster's host",
    "World": _ON_THE_WIRE,
    "WorldVariables": "one thing: what an agent answers, and what the server passes on",
}


@cache
def homonyms() -> dict[str, list[str]]:
    """The public classes at the top of modules whose name another module has too, with those modules."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    return {name: sorted(places) for name, places in found.items() if len(places) > 1}
