"""Which variables a cell needs from before, and which it makes: read from its text."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}

EVERYTHING = "*"  # in place of the names that `from module import *` binds: the text does not tell them

_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.Match, ast.With, ast.AsyncWith)


@dataclass
class NamesUsed:
    """Of one cell.

    Attributes:
        needed: read before the cell can have bound them.
        perhaps: read where it depends on the way through the cell whether it has bound them.
        bound: what it may bind at its top level.
        late: of what it reads, what only its functions do, when they are called: also what a cell after it has bound.
        builtin: what it reads of Python's own names, which a cell before may have bound: `input`, `max`.
    """

    needed: set[str] = field(default_factory=set)
    perhaps: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    builtin: set[str] = field(default_factory=set)


def names_used(tree: ast.Module) -> NamesUsed:
    """Statements in order; what functions read is looked up when they are called, most often after all is bound."""
    found, late = NamesUsed(), set[str]()
    _walk(tree.body, set(), found, late)
    found.late = late - found.needed - found.perhaps
    for name in late:
        (found.perhaps if {name, EVERYTHING} & found.bound else found.needed).add(name)
    found.perhaps -= found.needed
    return found


def always_bound(tree: ast.Module) -> set[str]:
    """What a cell binds in every case that lets it come to its end: imports, definitions and plain assignments."""
    return names_used(ast.Module([node for node in tree.body if not isinstance(node, _BRANCHES)], [])).bound


def takes(module: str, tree: ast.Module) -> bool:
    """Whether a cell may have this name of a module mean something else, or nothing."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if name == module:
                return True
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name) if (
                name == module
            ):
                return True
            case ast.Import(names=aliases) if any(alias.asname == module != alias.name for alias in aliases):
                return True
            case ast.ImportFrom(names=aliases) if {module, EVERYTHING} & {each.asname or each.name for each in aliases}:
                return True
    return False


def is_definition(tree: ast.Module) -> bool:
    """Whether a cell only imports, defines and names constants: left out, it changes nothing but those names."""
    return all(_defines(node) or _is_type_alias(node) for node in tree.body)


def _defines(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Pass():
            return True
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return not node.decorator_list
        case ast.Assign(targets=targets, value=value) if all(isinstance(target, ast.Name) for target in targets):
            return _is_constant(value)
        case ast.Expr(value=value):
            return _is_constant(value) or _only_shows(value)
    return False


def _is_constant(value: ast.expr) -> bool:
    return not any(isinstance(part, ast.Call | ast.Await | ast.Subscript | ast.Attribute) for part in ast.walk(value))


def _only_shows(value: ast.expr) -> bool:
    match value:
        case ast.Call(func=ast.Name(id="print" | "display"), args=arguments):
            return not any(isinstance(part, ast.Call) for item in arguments for part in ast.walk(item))
    return False


def _walk(body: Iterable[ast.stmt], certain: set[str], found: NamesUsed, late: set[str]) -> None:
    for node in body:
        _statement(node, certain, found, late)


def _statement(node: ast.stmt, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    match node:
        case ast.If(test=test, body=first, orelse=second):
            _read(test, certain, found, late)
            _branches([first, second], certain, found, late)
        case ast.For() | ast.AsyncFor() | ast.While():
            _loop(node, certain, found, late)
        case ast.With(items=items, body=body) | ast.AsyncWith(items=items, body=body):
            for item in items:
                _read(item.context_expr, certain, found, late)
                if item.optional_vars is not None:
                    _bind(item.optional_vars, certain, found)
            _walk(body, certain, found, late)
        case ast.Try() | ast.TryStar():
            _try(node, certain, found, late)
        case ast.Match():
            _match(node, certain, found, late)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            _function(node, certain, found, late)
        case ast.ClassDef():
            _class(node, certain, found, late)
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            for alias in aliases:
                _note((alias.asname or alias.name).split(".")[0], certain, found)
        case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Delete():
            _assignment(node, certain, found, late)
        case _ if _is_type_alias(node):
            _alias(node, certain, found, late)
        case _:
            _read(node, certain, found, late)


def _is_type_alias(node: ast.stmt) -> bool:
    """`type Row = list[int]`, which Python 3.12 and later have."""
    return type(node).__name__ == "TypeAlias"


def _alias(node: Any, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    """Its value is looked up when somebody asks for it."""
    own = _type_parameters(node, late)
    late |= _read_later([node.value]) - own
    _note(node.name.id, certain, found)


def _type_parameters(node: Any, late: set[str]) -> set[str]:
    """The names in brackets of `def first[T: Base](...)`; their bounds are looked up when somebody asks for them."""
    parameters = getattr(node, "type_params", ())
    own = {parameter.name for parameter in parameters}
    late |= _read_later([child for each in parameters for child in ast.iter_child_nodes(each)]) - own
    return own


def _read_later(parts: Iterable[ast.AST]) -> set[str]:
    inner, late = NamesUsed(), set[str]()
    for part in parts:
        _read(part, set(), inner, late)
    return inner.needed | inner.perhaps | late


def _loop(node: ast.For | ast.AsyncFor | ast.While, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    """Its body may never be executed: what that binds is not certain behind it."""
    inside = set(certain)
    if isinstance(node, ast.While):
        _read(node.test, certain, found, late)
    else:
        _read(node.iter, certain, found, late)
        _bind(node.target, inside, found)
        _read(node.target, inside, found, late)
    _walk(node.body, inside, found, late)
    _walk(node.orelse, set(certain), found, late)


def _try(node: ast.Try | ast.TryStar, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    inside = set(certain)
    unsure = _catches_missing(node)
    mine = NamesUsed(bound=found.bound) if unsure else found
    _walk(node.body, inside, mine, late)
    if unsure:
        found.perhaps |= mine.needed | mine.perhaps
        found.builtin |= mine.builtin
    for handler in node.handlers:
        here = set(certain)
        if handler.type is not None:
            _read(handler.type, certain, found, late)
        if handler.name:
            here.add(handler.name)
        _walk(handler.body, here, found, late)
    _walk(node.orelse, inside, found, late)
    _walk(node.finalbody, set(certain), found, late)
    if not node.handlers:
        certain |= inside


def _match(node: ast.Match, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    _read(node.subject, certain, found, late)
    for case in node.cases:
        inside = set(certain)
        for part in ast.walk(case.pattern):
            name = getattr(part, "name", None) or getattr(part, "rest", None)
            if isinstance(name, str):
                _note(name, inside, found)
            elif isinstance(part, ast.expr):
                _read(part, certain, found, late)
        if case.guard is not None:
            _read(case.guard, inside, found, late)
        _walk(case.body, inside, found, late)


def _class(node: ast.ClassDef, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    """Its body reads what is there when it is executed, and binds nothing outside."""
    for part in node.decorator_list:
        _read(part, certain, found, late)
    own = _type_parameters(node, late)
    inner, inside, late_inside = NamesUsed(), certain | own, set[str]()
    for part in (*node.bases, *(word.value for word in node.keywords)):
        _read(part, inside, found, late_inside)
    certain |= inside - own
    _walk(node.body, inside, inner, late_inside)
    late |= late_inside - own
    found.needed |= inner.needed
    found.perhaps |= inner.perhaps
    found.builtin |= inner.builtin
    _note(node.name, certain, found)


def _assignment(
    node: ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete, certain: set[str], found: NamesUsed, late: set[str]
) -> None:
    """Values are read before targets are bound; a target such as `a[i]` reads its own names."""
    if isinstance(node, ast.AnnAssign):
        _read(node.annotation, certain, found, late)
    targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
    value = None if isinstance(node, ast.Delete) else node.value
    if value is not None:
        _read(value, certain, found, late)
    for target in targets:
        if isinstance(target, ast.Name) and isinstance(node, ast.AugAssign | ast.Delete):
            _want(target.id, certain, found)
        if isinstance(node, ast.Delete):
            certain -= {target.id} if isinstance(target, ast.Name) else set()
        elif value is not None:
            _bind(target, certain, found)
        _read(target, certain, found, late)


def _branches(bodies: list[list[ast.stmt]], certain: set[str], found: NamesUsed, late: set[str]) -> None:
    ways = []
    for body in bodies:
        way = set(certain)
        _walk(body, way, found, late)
        ways.append(way)
    certain |= set.intersection(*ways)


def _catches_missing(node: ast.Try | ast.TryStar) -> bool:
    """`try: model` with `except NameError:` asks whether it is there."""
    return any(
        isinstance(part, ast.Name) and part.id in ("NameError", "Exception")
        for handler in node.handlers
        if handler.type is not None
        for part in ast.walk(handler.type)
    )


def _read(node: ast.AST, certain: set[str], found: NamesUsed, late: set[str]) -> None:
    """Names that are loaded in an expression, in the order of evaluation as far as it matters."""
    if isinstance(node, ast.Lambda):
        _inner(node, [node.body], _parameters(node.args), found, late)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            _read(default, certain, found, late)
        return
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        _comprehension(node, certain, found, late)
        return
    if isinstance(node, ast.NamedExpr):
        _read(node.value, certain, found, late)
        _note(node.target.id, certain, found)
        return
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load):
            _want(node.id, certain, found)
        return
    for child in ast.iter_child_nodes(node):
        _read(child, certain, found, late)


def _comprehension(
    node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp,
    certain: set[str],
    found: NamesUsed,
    late: set[str],
) -> None:
    """Its variables are its own, also where a function inside it reads them."""
    inside, own, late_inner = set(certain), set[str](), set[str]()
    for part in node.generators:
        _read(part.iter, inside, found, late_inner)
        own |= {name.id for name in ast.walk(part.target) if isinstance(name, ast.Name)}
        inside |= own
        for test in part.ifs:
            _read(test, inside, found, late_inner)
    for value in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
        _read(value, inside, found, late_inner)
    late |= late_inner - own


def _want(name: str, certain: set[str], found: NamesUsed) -> None:
    if name not in certain and name in _BUILTINS:
        found.builtin.add(name)
    elif name not in certain:
        is_unsure = name in found.bound or EVERYTHING in certain
        (found.perhaps if is_unsure else found.needed).add(name)


def _bind(target: ast.AST, certain: set[str], found: NamesUsed) -> None:
    for part in ast.walk(target):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            _note(part.id, certain, found)


def _note(name: str, certain: set[str], found: NamesUsed) -> None:
    certain.add(name)
    found.bound.add(name)


def _parameters(arguments: ast.arguments) -> set[str]:
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in listed if argument is not None}


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, certain: set[str], found: NamesUsed, late: set[str]
) -> None:
    for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
        _read(part, certain, found, late)
    own = _type_parameters(node, late)
    now: list[ast.AST] = [
        part.annotation for part in ast.walk(node.args) if isinstance(part, ast.arg) and part.annotation
    ]
    now += [node.returns] if node.returns is not None else []
    inside = certain | own
    for annotation in now:
        _read(annotation, inside, found, late)
    certain |= inside - own
    _inner(node, node.body, _parameters(node.args) | own, found, late)
    _note(node.name, certain, found)


def _inner(
    node: ast.AST,
    body: list[ast.stmt] | list[ast.expr],
    own: set[str],
    found: NamesUsed,
    late: set[str],
) -> None:
    """What a function reads from outside, when it is called; `global` names it binds there."""
    declared = {name for part in ast.walk(node) if isinstance(part, ast.Global) for name in part.names}
    found.bound |= declared
    inner = NamesUsed()
    for part in body:
        late_inner = set[str]()  # of functions inside, which see what is local here
        if isinstance(part, ast.stmt):
            _statement(part, set(), inner, late_inner)
        else:
            _read(part, set(), inner, late_inner)
        inner.needed |= late_inner
    local = own | (inner.bound - declared)
    late |= {name for name in inner.needed | inner.perhaps if name not in local}
    found.builtin |= inner.builtin - local
