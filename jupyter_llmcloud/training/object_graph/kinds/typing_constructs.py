"""What `typing` makes: type variables, new types, generic aliases, unions, special forms.

None of them changes, and `typing` hands out one alias to all who ask for the same. So none is ever filled: one that is
not there any more, or was not there, is made as the cell has made it.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
import typing
from typing import Any

from jupyter_llmcloud.training.object_graph.kinds.base import CannotSave, Child, Kind, Untouched
from jupyter_llmcloud.training.object_graph.kinds.code import Named

_FLAGS = ("covariant", "contravariant", "infer_variance")
_MODULES = frozenset({"typing", "annotationlib"})


class Alias(Kind):
    """`list[int]`, `int | None`, `Callable[[int], str]`, `Box[T]`, `Annotated[...]`: what is subscripted, and by what.

    `split` and `build` go the way that typing has for pickle, which does not know unions and unpacked ones.
    """

    name = "generic alias"
    filled = False
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if isinstance(value, types.UnionType):
            return ["union"], [("<arguments>", value.__args__)]
        if isinstance(value, types.GenericAlias) and value.__unpacked__:
            origin: Any = value.__origin__
            return ["unpacked"], [("<alias>", types.GenericAlias(origin, value.__args__))]
        function, (origin, arguments) = value.__reduce__()[:2]
        if function is not operator.getitem and not (isinstance(function, type) and isinstance(value, function)):
            raise CannotSave(f"a {type(value).__module__}.{type(value).__name__}")
        how = "subscripted" if function is operator.getitem else "made"
        return [how], [("<origin>", origin), ("<arguments>", arguments)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        match head[0]:
            case "union":
                return functools.reduce(operator.or_, children[0])
            case "unpacked":
                return next(iter(children[0]))
            case "subscripted":
                return children[0][children[1]]
        return cls(*children)


class TypeParameter(Kind):
    """TypeVar, ParamSpec and TypeVarTuple, made by a call or in brackets."""

    name = "type parameter"
    filled = False
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        flags = [flag for flag in _FLAGS if getattr(value, f"__{flag}__", False)]
        bound, constraints = _evaluated(value, "__bound__", None), _evaluated(value, "__constraints__", ())
        has_default = hasattr(value, "has_default") and value.has_default()
        default = (_evaluated(value, "__default__", None),) if has_default else ()
        children = [("<bound>", bound), ("<constraints>", constraints), ("<default>", default)]
        return [value.__name__, value.__module__, flags], children

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        (name, module, flags), (bound, constraints, default) = head, children
        given = dict.fromkeys(flags, True) | ({"bound": bound} if bound is not None else {})
        made = cls(name, *constraints, **given, **({"default": default[0]} if default else {}))
        made.__module__ = module  # else that of whoever called it, which is here
        return made


def _evaluated(value: Any, name: str, otherwise: Any) -> Any:
    """What a type parameter was given: in brackets that is evaluated only now, and may name what is not there."""
    try:
        return getattr(value, name, otherwise)
    except Exception:
        return otherwise


class OfParamSpec(Kind):
    """`P.args` and `P.kwargs`."""

    name = "part of a ParamSpec"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return ["args" if isinstance(value, typing.ParamSpecArgs) else "kwargs"], [("<origin>", value.__origin__)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return getattr(children[0], head[0])


class New(Kind):
    """NewType."""

    name = "NewType"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.__qualname__, value.__module__], [("<supertype>", value.__supertype__)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        made = cls(head[0], children[0])
        made.__module__ = head[1]
        return made


class Reference(Kind):
    """The name of a type, as a text in an annotation."""

    name = "forward reference"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.__forward_arg__], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return cls(head[0])


class SpecialForm(Named):
    """`typing.Union`, `typing.List`: what typing itself has under a name."""

    name = "special form"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        name = value.__reduce__()
        if not isinstance(name, str):
            raise CannotSave(f"a {type(value).__module__}.{type(value).__name__}")
        return [f"{type(value).__module__}:{name}"], []


class NamedAlias(Untouched):
    """`type Tree = dict[str, Tree]`: it is evaluated only when asked, and may lead to itself. As the cell makes it."""

    name = "type statement"


_ALIAS, _PARAMETER, _OF_PARAM_SPEC, _SPECIAL = Alias(), TypeParameter(), OfParamSpec(), SpecialForm()
_BY_TYPE: dict[type, Kind] = {
    typing.TypeVar: _PARAMETER,
    typing.ParamSpec: _PARAMETER,
    typing.TypeVarTuple: _PARAMETER,
    typing.ParamSpecArgs: _OF_PARAM_SPEC,
    typing.ParamSpecKwargs: _OF_PARAM_SPEC,
    typing.NewType: New(),
    typing.ForwardRef: Reference(),
}
if sys.version_info >= (3, 12):
    _BY_TYPE[typing.TypeAliasType] = NamedAlias()
KINDS: tuple[Kind, ...] = (_ALIAS, _SPECIAL, *_BY_TYPE.values())


def is_construct(value: Any) -> bool:
    """Whether `typing` makes such objects; its classes are classes."""
    return isinstance(value, types.GenericAlias | types.UnionType) or type(value).__module__ in _MODULES


def kind_of_construct(value: Any) -> Kind:
    """The kind of one of these."""
    is_alias = hasattr(value, "__origin__") and hasattr(value, "__args__")
    return _BY_TYPE.get(type(value)) or (_ALIAS if is_alias or isinstance(value, types.UnionType) else _SPECIAL)
