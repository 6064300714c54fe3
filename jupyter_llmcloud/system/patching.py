"""Replacing functions of other packages: recorded, checked against their signatures, reversible.

A package of ours that must replace somebody else's function keeps a catalogue of `Patch` records and replaces nothing
in any other way. A patch is applied whole or not at all: when a target is missing, or has other parameters than it was
written for, nothing is replaced, the feature is off, and `Patch.problem` says so in words. A replacement looks like its
original: name, documentation, module and signature, since libraries build calls from `inspect.signature`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Make = Callable[[Any], Any]  # gets the original, returns what takes its place
Names = tuple[str, ...]

_notices: list[str] = []
_applied: dict[str, Patch] = {}  # by target
_signatures: dict[Any, inspect.Signature] = {}  # of functions that the processes forked from this one replace
_MISSING = object()


@dataclass(eq=False)
class Patch:
    """Functions of other packages that one feature replaces.

    Attributes:
        feature: what it gives, as the subject of a sentence.
        why: why no public mechanism does it.
        without: what is to be expected where it cannot be applied, as a sentence.
        checked: packages and the versions that it was tested with.
        targets: by "module:attribute.path" (or "module", to replace a whole module), the parameters that the target
            must begin with, `self` left out, with `a|b` for one that is called differently in some versions; None for
            what has no signature.
    """

    feature: str
    why: str
    without: str
    checked: str
    targets: Mapping[str, Names | None]
    _originals: dict[str, Any] = field(default_factory=dict, repr=False)
    _former: dict[str, Patch] = field(default_factory=dict, repr=False)  # whose replacement a target was
    _is_checked: bool = field(default=False, repr=False)

    @property
    def module(self) -> str:
        """The module that its first target is in."""
        return next(iter(self.targets)).partition(":")[0]

    def check_once(self) -> None:
        """Spare the processes forked from this one the check, where what is replaced is imported and as it must be.

        And reading signatures, which writes to the pages of all that is named in one: no fork shares them then.
        """
        modules = {target.partition(":")[0] for target in self.targets}
        self._is_checked = modules <= sys.modules.keys() and self.problem() is None
        if self._is_checked:
            for original in filter(inspect.isfunction, map(_get, self.targets)):
                with contextlib.suppress(TypeError, ValueError):  # what it wraps may have none
                    _signatures[original] = inspect.signature(original)

    def problem(self) -> str | None:
        """Why it cannot be applied here, in words for the user; None when it can."""
        if self._is_checked:
            return None
        for target, parameters in self.targets.items():
            if (difference := _difference(target, parameters)) is not None:
                return (
                    f"{self.feature} is off: {difference} (checked with {self.checked}; here is {_here(target)}). "
                    f"{self.without}"
                )
        return None

    def apply(self, replacements: Mapping[str, Make]) -> bool:
        """Replace every target; False, with a notice, when one of them is not what the patch was written for."""
        if (unknown := set(replacements) ^ set(self.targets)) or self._originals:
            raise ValueError(f"{self.feature}: applied twice, or not to its own targets: {sorted(unknown)}")
        if not self.is_possible():
            return False
        for target, make in replacements.items():
            original = _get(target)
            self._originals[target] = original
            if target in _applied:
                self._former[target] = _applied[target]
            _applied[target] = self
            _set(target, alike(make(original), original))
        return True

    def apply_by_name(self, functions: Mapping[str, Any]) -> bool:
        """Replace every target by the function of its name, whatever the original is."""
        names = {target: target.replace(":", ".").rpartition(".")[2] for target in self.targets}
        return self.apply({target: functools.partial(_instead, functions[name]) for target, name in names.items()})

    def is_possible(self) -> bool:
        """Whether it can be applied here; leaves a notice when not."""
        if (problem := self.problem()) is not None and problem not in _notices:
            _notices.append(problem)
        return problem is None

    def undo(self) -> None:
        """Put the originals back; does nothing when they are in place."""
        for target, original in self._originals.items():
            _set(target, original)
            _applied.pop(target, None)
        _applied.update(self._former)
        self._originals.clear()
        self._former.clear()

    def original(self, target: str) -> Any:
        """What a target is when it is not replaced."""
        return self._originals[target] if target in self._originals else _get(target)


def alike(replacement: Any, original: Any) -> Any:
    """A function that has the name, the documentation and the signature of another one."""
    if not inspect.isroutine(original) or not inspect.isfunction(replacement):
        return replacement
    functools.update_wrapper(replacement, original)
    if inspect.isbuiltin(original):
        # Its signature is found by __wrapped__ when somebody asks. To read it, inspect copies sys.modules, which writes
        # to a page of each module: 12 MiB that a forked rank would no longer share.
        return replacement
    try:
        # Besides __wrapped__, which inspect.getfullargspec does not follow.
        signature = _signatures.get(original) or inspect.signature(original)
        replacement.__signature__ = signature  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        pass  # some built-in functions have none
    return replacement


def applied() -> list[str]:
    """The targets that are replaced in this process at present."""
    return sorted(_applied)


def add_notice(text: str) -> None:
    """Have the user told, once, of something else that is off."""
    if text not in _notices:
        _notices.append(text)


def take_notices() -> list[str]:
    """What is off, in words for the user; each is given once."""
    taken = list(_notices)
    _notices.clear()
    return taken


def _instead(replacement: Any, _: Any) -> Any:
    return replacement


def _difference(target: str, parameters: Names | None) -> str | None:
    try:
        present = _get(target)
    except (ImportError, AttributeError):
        return f"there is no {_spelled(target)}"
    if parameters is None:
        return None
    try:
        found = [*inspect.signature(present).parameters.values()]
    except (TypeError, ValueError):
        return f"{_spelled(target)} tells no parameters"
    if found and found[0].name == "self":
        found = found[1:]
    names = tuple(parameter.name for parameter in found)
    begins_so = all(name in known.split("|") for name, known in zip(names, parameters, strict=False))
    if len(names) < len(parameters) or not begins_so:
        return (
            f"{_spelled(target)} takes ({', '.join(names)}) instead of ({', '.join(parameters).replace('|', ' or ')})"
        )
    return None


def _spelled(target: str) -> str:
    return target.replace(":", ".")


def _here(target: str) -> str:
    package = target.partition(":")[0].partition(".")[0]
    try:
        return f"{package} {importlib.metadata.version(package.lower())}"
    except importlib.metadata.PackageNotFoundError:
        return f"Python {sys.version.split()[0]}"


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _get(target: str) -> Any:
    if ":" not in target:
        return sys.modules.get(target, _MISSING)
    owner, name = _owner(target)
    return getattr(owner, name)


def _set(target: str, value: Any) -> None:
    if ":" in target:
        owner, name = _owner(target)
        setattr(owner, name, value)
        return
    parent, _, name = target.rpartition(".")
    if value is _MISSING:
        sys.modules.pop(target, None)
        vars(sys.modules[parent]).pop(name, None)
        return
    sys.modules[target] = value
    setattr(importlib.import_module(parent), name, value)
