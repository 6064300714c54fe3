"""Bodies that carry the options of a `core.spec`: their fields and schema come from there, and so do their checks."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from jupyter_llmcloud.core.options import Option
from jupyter_llmcloud.core.spec import Interface, Spec
from jupyter_llmcloud.protocol.http.base import Body


class Options(Body, frozen=True):
    """Base of a body with options."""

    def given(self) -> dict[str, Any]:
        """Those that are in the body, unchecked: for `Spec.make`."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not UNSET and value is not None}


def options_body(name: str, doc: str, spec: type[Spec], more: list[tuple[Any, ...]] | None = None) -> type[Options]:
    """A body with the options that a spec has over REST, behind fields of its own (`more`: name, type, default)."""
    hints = typing.get_type_hints(spec)
    fields = [(option.name, _annotated(option, hints[option.name]), UNSET) for option in spec.options(Interface.REST)]
    made = msgspec.defstruct(
        name,
        [*(more or []), *fields],
        bases=(Options,),
        module=__name__,
        namespace={"__doc__": doc},
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )
    return typing.cast(type[Options], made)


def _annotated(option: Option, hint: Any) -> Any:
    # Any: an option is checked by its spec, which also reads it from text and names it as the other doors do.
    return Annotated[Any | UnsetType, Meta(description=option.help, extra_json_schema=_schema(option, hint))]


def _schema(option: Option, hint: Any) -> dict[str, Any]:
    kinds = [kind for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))]
    kind = next(kind for kind in kinds if kind is not type(None))
    default = {} if option.default is None else {"default": option.default}
    if option.values:
        return {"type": "string", "enum": list(option.values), **default}
    if set(kinds) == {int, str}:  # a number, or a text that says more
        return {"type": ["integer", "string"], **default}
    if kind is float:  # a duration: seconds, or as it is typed: 90s, 30m, 2h
        return {"type": ["number", "string"], **default}
    if typing.get_origin(kind) is list:
        return {"type": ["array", "string"], "items": {"type": "string"}, **default}
    return {"type": {int: "integer", bool: "boolean"}.get(kind, "string"), **default}
