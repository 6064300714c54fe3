"""Processes that are started by spawn or forkserver get what lives in `__main__` by value.

multiprocessing sends it by name, and has the new process import the main module again. A notebook has none to import:
its classes and functions go along with what needs them, and are in the `__main__` of the new process, so that what it
sends back by name is found again. What is sent later, by queues and pipes (the tasks of a Pool), carries a definition
for whoever does not know its name; a process that was forked knows its own.
"""

from __future__ import annotations

import multiprocessing.reduction
import pickle
import secrets
import sys
from collections import ChainMap
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import cloudpickle

_MAIN = "__main__"
_WAYS_OUT = (
    "A process that is started by spawn or forkserver, the default of Python 3.14, gets classes and functions of a "
    "cell by value, with all that they use. Two ways out: keep them in a module beside the notebook and import it, or "
    'start workers by fork: DataLoader(..., multiprocessing_context="fork").'
)


_has_started = False  # a process by spawn or forkserver
_first_calls: list[Callable[[], Callable[[], None]]] = []
_versions: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of definitions that were sent by value
_unpacked: dict[str, str] = {}  # versions of what this process was sent, by name


def call_first(make: Callable[[], Callable[[], None]]) -> None:
    """Have each process that is started call what `make` returns then, before it does what it was started for.

    That must be importable there, such as a `functools.partial` of a function of a module.
    """
    _first_calls.append(make)


def dump(obj: Any, file: Any, protocol: int | None = None) -> None:
    """As `multiprocessing.reduction.dump`. Raises PicklingError that names what of a cell cannot be sent."""
    global _has_started
    _has_started = True
    pickler = _Pickler(file, protocol)
    try:
        pickler.dump(_WithMain(obj, pickler.sent, [make() for make in _first_calls]))
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        if not pickler.sent:
            raise
        raise pickle.PicklingError(f"{pickler.last!r} of the cell cannot be sent: {error}. {_WAYS_OUT}") from error


def reduce_message(obj: Any) -> Any:
    """For `reducer_override` of a pickler whose reader is a process that was started earlier, by whatever method.

    Raises PicklingError that names what of a cell cannot be sent.
    """
    if not _has_started or getattr(obj, "__module__", None) != _MAIN or not isinstance(obj, type | FunctionType):
        return NotImplemented
    name = obj.__qualname__
    try:
        value = cloudpickle.dumps(obj)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise pickle.PicklingError(f"{name!r} of the cell cannot be sent: {error}. {_WAYS_OUT}") from error
    version = _versions.setdefault(obj, secrets.token_hex(8))
    return _find_or_unpack, (name, version, value)


def _find_or_unpack(name: str, version: str, value: bytes) -> Any:
    """A definition of this process's own main module; one that was sent before, or that is made now."""
    main = vars(sys.modules[_MAIN])
    if name in main and _unpacked.get(name, version) == version:
        return main[name]
    definition = pickle.loads(value)
    if name.isidentifier():
        main[name], _unpacked[name] = definition, version
    return definition


class _Pickler(cloudpickle.Pickler):
    """cloudpickle that knows what multiprocessing, torch among others, has registered for its own pickler.

    Attributes:
        sent: what of `__main__` has been met, by name.
        last: the name of the class or function that was met last, or of an object's class.
    """

    def __init__(self, file: Any, protocol: int | None) -> None:
        registered = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        self.dispatch_table = ChainMap(registered, cloudpickle.CloudPickler.dispatch_table)  # read by what comes next
        super().__init__(file, protocol)
        self.sent: dict[str, Any] = {}
        self.last = ""

    def reducer_override(self, obj: Any) -> Any:
        if getattr(obj, "__module__", None) == _MAIN:
            if name := getattr(obj, "__qualname__", ""):
                self.sent[name] = obj
            self.last = (name or type(obj).__qualname__).partition(".")[0]
        return super().reducer_override(obj)


class _WithMain:
    """What is sent, and after it what of `__main__` went with it, and what is called first."""

    def __init__(self, obj: Any, definitions: dict[str, Any], first: list[Callable[[], None]]) -> None:
        self._obj = obj
        self._definitions = definitions
        self._first = first

    def __reduce__(self) -> Any:
        return _unpack, (self._obj, self._definitions, self._first)


def _unpack(obj: Any, definitions: dict[str, Any], first: list[Callable[[], None]]) -> Any:
    for function in first:
        function()
    main = vars(sys.modules[_MAIN])
    for name, value in definitions.items():
        if name.isidentifier():
            main.setdefault(name, value)
    return obj
