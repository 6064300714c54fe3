"""What code of the user, and the values that it uses, are known by: another fingerprint when any of them changes.

Prepared data is gone on with when nothing has changed that decides about its rows. A function decides by its text, by
the values around it (a list of words, a limit, a pattern, a tokenizer), and so on through what it calls; what comes
from installed packages is known by its name. The same in every process: addresses and hash seeds have no part in it.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_PLAIN = frozenset({str, int, float, complex, bool, bytes, type(None), type(...)})
_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
_BUILTIN = (types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType)
# Of slow tokenizers of transformers: where they came from, and what they note while they are used.
_NO_RULE = frozenset({"cache", "deprecation_warnings", "init_kwargs", "init_inputs", "name_or_path", "chat_template"})
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_ABOVE = b"above"  # of what is being gone through: it refers to itself


def fingerprint(value: Any) -> str:
    """SHA-256 of a function with all that it uses, or of any other value."""
    return _Walk().of(value).hex()


def canonical_definition(text: str) -> str:
    """The definition of a fast tokenizer without what does not decide about the tokens of a text."""
    return json.dumps({**json.loads(text), "truncation": None, "padding": None}, sort_keys=True)


class _Walk:
    """Goes through a value and everything that it refers to, each thing once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, Any]] = {}  # with the value, so that no other one gets its address

    def of(self, value: Any) -> bytes:
        """What a value is known by."""
        if type(value) in _PLAIN:
            return _digest(type(value).__name__, value if isinstance(value, bytes) else repr(value))
        if (known := self._known.get(id(value))) is None:
            self._known[id(value)] = _ABOVE, value
            known = self._known[id(value)] = self._of_new(value), value
        return known[0]

    def _all(self, values: Iterable[Any]) -> list[bytes]:
        return [self.of(value) for value in values]

    def _of_new(self, value: Any) -> bytes:
        kind = type(value)
        if isinstance(value, dict):
            return self._of_mapping(value)
        if kind in (list, tuple):
            return _digest(kind.__name__, *self._all(value))
        if kind in (set, frozenset):
            return _digest(kind.__name__, *sorted(self._all(value)))
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return _digest("method", *self._all([value.__func__, value.__self__]))
        if isinstance(value, types.ModuleType):
            return _digest("module", value.__name__, "" if is_installed(value.__name__) else _text(value))
        if isinstance(value, _BUILTIN):
            bound = getattr(value, "__self__", None)
            of_module = isinstance(bound, types.ModuleType)
            return _digest("builtin", f"{value.__module__}" if of_module else self.of(bound), value.__qualname__)
        if callable(value) and hasattr(value, "__wrapped__"):  # functools.cache
            return _digest(kind.__name__, self.of(value.__wrapped__))
        if kind.__module__.startswith("tokenizers") and hasattr(value, "to_str"):
            return _digest("tokenizer", canonical_definition(value.to_str()))
        return self._of_tokenizer(value) if hasattr(value, "convert_ids_to_tokens") else self._of_object(value)

    def _of_mapping(self, value: dict[Any, Any]) -> bytes:
        kind = type(value).__name__
        if all(type(name) in _PLAIN and type(inner) in _PLAIN for name, inner in value.items()):
            return _digest(kind, repr(dict(value)))  # vocabularies are large
        return _digest(kind, *self._all(part for item in value.items() for part in item))

    def _of_class(self, found: type) -> bytes:
        name = f"{found.__module__}.{found.__qualname__}"
        if is_installed(found.__module__):
            return _digest("class", name)
        parts = self._all(found.__bases__)
        for attribute, item in sorted(vars(found).items()):
            if isinstance(item, _METHODS) or not (attribute.startswith("__") and attribute.endswith("__")):
                parts += self._all([attribute, _function_of(item)])
        return _digest("class", name, *parts)

    def _of_function(self, function: types.FunctionType) -> bytes:
        if is_installed(function.__module__):
            return _digest("function", f"{function.__module__}.{function.__qualname__}")
        code = function.__code__
        # Not the text of the function: of one that is wrapped inspect gives what is inside. That of a lambda is its
        # whole line, with the other options of the request.
        text = _text(code) if code.co_name != "<lambda>" else ""
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        used = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        around = function.__globals__
        used |= {name: around[name] for name in _global_names(code) if name in around}
        parts = self._all([function.__defaults__, function.__kwdefaults__])
        parts += self._all(part for item in sorted(used.items(), key=lambda item: item[0]) for part in item)
        return _digest("function", text or self._of_code(code), *parts)

    def _of_code(self, code: types.CodeType) -> bytes:
        """Of a function whose text is nowhere."""
        constants = [
            self._of_code(constant) if isinstance(constant, types.CodeType) else self.of(constant)
            for constant in code.co_consts
        ]
        return _digest("code", code.co_code, repr((code.co_names, code.co_varnames)), *constants)

    def _of_tokenizer(self, tokenizer: Any) -> bytes:
        """One of transformers."""
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            return self.of(backend)
        rules = sorted(vars(tokenizer).items(), key=lambda item: item[0])
        kept = [(name, value) for name, value in rules if name not in _NO_RULE and not name.endswith("_file")]
        return _digest("tokenizer", self.of(type(tokenizer)), *self._all(part for item in kept for part in item))

    def _of_object(self, value: Any) -> bytes:
        """Of any other object: what pickle would make it of."""
        if (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # pickle tells addresses
            return _digest("tensor", str(value.dtype), repr(tuple(value.shape)), content.numpy().tobytes())
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception:  # a lock, a file: it cannot be sent to the workers either, which is said there
            return _digest("object", self.of(type(value)))
        if isinstance(parts, str):
            return _digest("global", f"{type(value).__module__}.{parts}")
        return _digest("object", *self._all(list(part) if isinstance(part, Iterator) else part for part in parts))


def _digest(kind: str, *parts: str | bytes) -> bytes:
    found = hashlib.sha256(kind.encode())
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(f":{len(content)}:".encode())
        found.update(content)
    return found.digest()


def _function_of(item: Any) -> Any:
    if isinstance(item, staticmethod | classmethod):
        return item.__func__
    if isinstance(item, property):
        return [item.fget, item.fset]
    return item.func if isinstance(item, functools.cached_property) else item


def _text(thing: Any) -> str:
    """Its source; "" where there is none."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that has no value yet
        return False
    return True


def _global_names(code: types.CodeType) -> set[str]:
    """The names that a function, and what is defined within it, looks for in its module."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in _GLOBAL}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(_global_names, inner))


def is_installed(name: str | None) -> bool:
    """Whether a module comes with Python or with a package, and is not the user's own."""
    if name is None or name == "__main__":
        return False
    top = name.partition(".")[0]
    if top == __name__.partition(".")[0] or top in sys.stdlib_module_names or (top != name and is_installed(top)):
        return True
    module = sys.modules.get(name)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]  # a namespace has no file
    return any(_INSTALLED & {*Path(place).parts} for place in places if place)
