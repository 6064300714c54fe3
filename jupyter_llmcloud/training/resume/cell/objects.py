"""The objects that a cell's variables lead to: what must be saved of them, and put back in the next attempt.

Variables are those of the functions of the user that run, of the notebook, and of the user's own modules; beside them
the attributes of a Trainer. What the code will write before it reads it, or never mentions, need not be saved.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from jupyter_llmcloud.training.object_graph.graph import ANY, GRADIENT, LOSES, MAY, MUST, Graph, Identities
from jupyter_llmcloud.training.object_graph.kinds import iterators
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, CannotSave, Kind
from jupyter_llmcloud.training.object_graph.kinds.dispatch import DATA_SET, STATEFUL_FOLLOWED, TRAINED_TENSOR
from jupyter_llmcloud.training.object_graph.liveness import may_be_read, may_be_read_by_body, names_in, names_written
from jupyter_llmcloud.training.object_graph.restore import Restorer
from jupyter_llmcloud.training.object_graph.state import CopyBytes, ObjectState
from jupyter_llmcloud.training.resume.cell import frame_variables
from jupyter_llmcloud.training.resume.user_code import is_own_module, own_modules
from jupyter_llmcloud.training.shell.failure_locals import holds_secret

_MODULE = "module:"
_FEW = 1000  # items of a variable that nothing mentions
_CONTAINERS = torch.Tensor | np.ndarray | list | dict | set | tuple


@dataclass(frozen=True)
class Scope:
    """Where a cell is, and what is saved of it in another way.

    Attributes:
        frames: of the user's code that runs, outermost first.
        given: names that every namespace starts with.
        before: names that other cells had given to the namespace when this one began.
        attributes: objects of a library whose attributes are looked at like variables, by address.
        always: addresses of attributes that are put back whether they have changed or not.
        sources: what the running loops draw from.
        followed: objects that are saved, or led back, in another way.
        loaders: those of the cell.
    """

    frames: list[FrameType]
    given: set[str]
    before: set[str] = field(default_factory=set)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    always: Iterable[str] = ()
    sources: Iterable[Any] = ()
    followed: Iterable[Any] = ()
    loaders: Iterable[Any] = ()

    def kinds(self) -> dict[int, Kind]:
        """How some objects are to be looked at, by id."""
        found = iterators.rows_of(list(self.loaders))
        for source in self.sources:
            if isinstance(source, iterators.Generator) and not iterators.draws_from_loader(source):
                found[id(source)] = iterators.IN_LOOP
        return {**found, **{id(value): _kind_of_followed(value) for value in self.followed}}


def _kind_of_followed(value: Any) -> Kind:
    if isinstance(value, torch.optim.Optimizer):
        return STATEFUL_FOLLOWED
    return TRAINED_TENSOR if isinstance(value, torch.Tensor) else iterators.FOLLOWED


class CellObjects:
    """The objects of the cell that a rank executes.

    Attributes:
        suspended: variables of generators that wait for their next batch, by the name of their function.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        self._state = ObjectState()
        self.suspended: dict[str, dict[str, Any]] = {}
        self._alive: dict[tuple[CodeType, int], set[str]] = {}
        self._names: dict[CodeType, set[str]] = {}
        self._own_names: dict[CodeType, set[str]] = {}
        self._handed_on: set[str] = set()  # addresses of variables that rounds of the outermost loop may hand on

    def graph(self, scope: Scope, known: Identities | None = None) -> Graph:
        """Everything that the variables lead to. Raises NotPlain when that is too much."""
        graph = Graph(known if known is not None else self._state.known, scope.kinds())
        roots = [*self._variables(scope), *_of_modules(), *_of_attributes(scope)]
        try:
            for need in (MUST, LOSES, ANY, MAY):
                for address, value, its_need in roots:
                    if its_need == need:
                        graph.add(address, value, need)
        except CannotSave as error:
            raise NotPlain(str(error)) from None
        return graph

    def _variables(self, scope: Scope) -> list[tuple[str, Any, str]]:
        found = []
        for depth, frame in enumerate(scope.frames):
            needs, written = self._needs(frame), self._written(frame)
            for name, value in list(frame.f_locals.items()):
                is_shells = not frame_variables.is_users(name) or name in scope.given
                if (is_shells and name not in written) or holds_secret(value):
                    continue
                need = needs.get(name, MAY)
                if need != MAY or not _is_long(value):
                    found.append((f"{depth} {name}", value, need))
        return found

    def _needs(self, frame: FrameType) -> Mapping[str, str]:
        """What is to be done about the variables of a frame; one without an entry is mentioned nowhere."""
        code = frame.f_code
        if not hasattr(code, "co_names"):
            return dict.fromkeys(frame.f_locals, ANY)  # the cell has ended
        at = code, frame.f_lasti
        if at not in self._alive:
            self._alive[at] = may_be_read(frame)
        alive = self._alive[at]
        if code.co_flags & inspect.CO_OPTIMIZED:  # of a function
            return {name: MUST if name in alive else LOSES for name in frame.f_locals}
        shared = {name for value in list(frame.f_locals.values()) for name in self._mentioned(value)}
        return {**dict.fromkeys(self._names_in(code), LOSES), **dict.fromkeys(shared | alive, MUST)}

    def _written(self, frame: FrameType) -> set[str]:
        """Names of a frame that are the user's, although the shell, or every namespace, has some like them."""
        code = frame.f_code
        if not hasattr(code, "co_names"):
            return set()  # the cell has ended
        if code not in self._own_names:
            names = names_written(code)
            self._own_names[code] = {name for name in names if not frame_variables.is_ours(name)}
        return self._own_names[code]

    def _mentioned(self, value: Any) -> set[str]:
        """The names that a function of the user, or the methods of a class, mention; also where others wrap it."""
        found = set[str]()
        if isinstance(value, FunctionType) and is_own_module(str(value.__module__)):
            found = self._names_in(value.__code__)
        if isinstance(value, type) and is_own_module(str(value.__module__)):
            return found.union(*(self._mentioned(item) for item in vars(value).values() if item is not value))
        return found.union(*(self._mentioned(inner) for inner in _wrapped_by(value)))

    def _names_in(self, code: CodeType) -> set[str]:
        if code not in self._names:
            self._names[code] = names_in(code)
        return self._names[code]

    # --- comparing and saving ---

    @property
    def has_begun(self) -> bool:
        """Whether the beginning of the training has been seen."""
        return self._state.has_begun

    def remember(self, graph: Graph, covered: set[int]) -> None:
        """How what is new is now."""
        self._state.remember(graph, covered)

    def remember_bodies(self, is_in_same_bodies: Callable[[], bool]) -> None:
        """The training has begun, in the bodies of these loops."""
        self._state.remember_bodies(is_in_same_bodies)

    def forget(self) -> None:
        """What was remembered was before something else than the training."""
        self._state, self._handed_on = ObjectState(), set()

    def note_loop(self, frames: list[FrameType]) -> None:
        """The outermost loop is about to begin, in the innermost of these."""
        if frames:
            self._handed_on = {f"{len(frames) - 1} {name}" for name in may_be_read_by_body(frames[-1])}

    def take(
        self, scope: Scope, graph: Graph, covered: set[int], trained: set[int], copy: CopyBytes, limit: int
    ) -> dict[str, Any]:
        """What has changed, in loadable values. Raises NotPlain for what cannot be saved.

        `covered`: where memory begins that is saved with its module or optimizer; `trained`: ids of tensors whose
        gradients are saved with their optimizer; `limit`: bytes of a tensor that is made anew in every step.
        """
        graph.add_gradients(trained)
        saved = self._state.take(graph, covered, copy, limit)
        self._refuse_data_handed_on(saved)
        for address, root in saved["roots"].items():
            where, _, name = address.partition(" ")
            root["before"] = not where.isdigit() or (where == "0" and name in scope.before)
        names = [node["head"][0] for node in saved["nodes"].values() if node["kind"] == iterators.DELIVERING.name]
        if twice := {name for name in names if names.count(name) > 1}:
            raise NotPlain(
                f"two generators of the function {twice.pop()} are under way, which cannot be told apart when they go "
                "on. Give each a function of its own, or write `for batch in loader`"
            )
        return saved

    def _refuse_data_handed_on(self, saved: Mapping[str, Any]) -> None:
        """A round of the loop makes its data set of that of the round before, and rows are not saved."""
        for address in self._handed_on & saved["roots"].keys():
            root = saved["roots"][address]
            node = saved["nodes"][root["value"][0]] if type(root["value"]) is list else {}
            if node.get("kind") == DATA_SET.name and (root["changed"] or node["changed"]):
                name = address.partition(" ")[2]
                raise NotPlain(
                    f"{name!r} is a data set that each round of a loop makes of the one before, and a checkpoint holds "
                    f"no rows: a resumed cell would go on with others. Make each round's of what was there before the "
                    f"loop, under a name of its own: epoch_{name} = {name}.shuffle(seed=epoch)"
                )

    def changed_while_written(self) -> list[str]:
        """Addresses of memory that `take` left to be compared later and that has changed; the next `take` holds it."""
        changed = [compare.address for compare in self._state.later if compare.has_changed()]
        self._state.note_changed(changed)
        return changed

    # --- coming back ---

    def put(self, saved: dict[str, Any], graph: Graph, scope: Scope, is_same: bool, is_restart: bool) -> None:
        """Put back what `take` took, into the objects of `graph`.

        `is_same`: the world has as many ranks as then. `is_restart`: it is the same run, so that the cell is as it was
        and everything is put back and checked; else only what the training had changed.
        """
        everything = is_same and is_restart
        in_use = {id(source) for source in scope.sources}
        restorer = Restorer(saved["nodes"], graph, everything, in_use)
        always = set(scope.always)
        roots = saved["roots"]
        wanted = [at for at in roots if everything or _is_wanted(at, roots[at], graph, always, is_restart)]
        lacking = {at for at in wanted if _is_of_others(at, saved, graph)}  # on a rank that is new
        wanted = [at for at in wanted if at not in lacking]
        values = {address: restorer.root(saved["roots"][address]) for address in wanted}
        tensors = {at: restorer.value([at.removesuffix(GRADIENT)]) for at in wanted if at.endswith(GRADIENT)}
        waiting = [node for node in saved["nodes"].values() if node["kind"] == iterators.DELIVERING.name and is_same]
        generators = [(node["head"], [restorer.value(item) for item in node["items"]]) for node in waiting]
        restorer.finish()
        self.suspended = {function: dict(zip(names, items, strict=True)) for (function, names), items in generators}
        for address, tensor in tensors.items():
            tensor.grad = values.pop(address)
        _bind(values, scope)
        self._state.note_restored(saved)

    def went_on(self, frames: list[FrameType]) -> None:
        """A pass that was under way is drawn from again: the generators round it are given their variables."""
        if self.suspended:
            frame_variables.resume_suspended(frames, self.suspended)


def _wrapped_by(value: Any) -> list[Any]:
    """The functions inside one that was decorated, a method of a class, a property or a partial."""
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    if isinstance(value, functools.partial):
        return [value.func]
    if isinstance(value, staticmethod | classmethod | MethodType):
        return [value.__func__]
    if isinstance(value, FunctionType | functools._lru_cache_wrapper):
        inner = vars(value).get("__wrapped__")
        return [inner] if inner is not None and inner is not value else []
    return []


def _is_long(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(np.prod(value.shape)) > _FEW
    return isinstance(value, list | dict | set | tuple) and len(value) > _FEW


def _of_modules() -> list[tuple[str, Any, str]]:
    """The variables of the user's own modules."""
    return [
        (f"{_MODULE}{module} {name}", value, MUST)
        for module, found in own_modules()
        for name, value in list(vars(found).items())
        if not (name.startswith("__") and name.endswith("__"))
        and not isinstance(value, ModuleType)
        and not frame_variables.is_compilers(name)
    ]


def _of_attributes(scope: Scope) -> list[tuple[str, Any, str]]:
    return [
        (f"{address}.{name}", value, MUST if _is_the_users(value) else ANY)
        for address, owner in scope.attributes.items()
        for name, value in list(vars(owner).items())
    ]


def _is_the_users(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) or type(value) in SIMPLE or is_own_module(str(type(value).__module__))


def _is_wanted(address: str, root: dict[str, Any], graph: Graph, always: set[str], is_restart: bool) -> bool:
    """Whether a variable is put back in a cell that may have been edited, or into another number of ranks."""
    came_later = not (root.get("before", True) if is_restart else root.get("early", True))
    if address in always or (came_later and address not in graph.roots and address[0].isdigit()):
        return True
    if root["new"] and not address[0].isdigit():
        return False  # the training may have added the attribute, or just the rank that saved it
    return bool(root["changed"]) or (type(root["value"]) is list and address in graph.roots)


def _is_of_others(address: str, saved: dict[str, Any], graph: Graph) -> bool:
    """Whether a variable of other cells, which the training has not touched, is not there in a new process.

    One that this cell has given its value is missing since it came in an iteration that is not run again.
    """
    root = saved["roots"][address]
    if address in graph.roots or root["changed"] or not root.get("before", True):
        return False
    if type(root["value"]) is not list:
        return address.startswith(_MODULE)
    return not saved["nodes"][root["value"][0]]["changed"]


def _bind(values: dict[str, Any], scope: Scope) -> None:
    """Give the variables their values."""
    frames: dict[int, dict[str, Any]] = {}
    for address, value in values.items():
        where, _, name = address.partition(" ")
        if where.isdigit():
            frames.setdefault(int(where), {})[name] = value
        elif where.startswith(_MODULE):
            module = sys.modules.get(where.removeprefix(_MODULE))
            if module is None:
                raise ResumeMissed(f"the module {where.removeprefix(_MODULE)} was imported, now it is not.")
            setattr(module, name, value)
        else:
            owner, _, attribute = address.rpartition(".")
            if owner not in scope.attributes:
                raise ResumeMissed(
                    f"the checkpoint holds attributes of {owner!r}, but the cell has made no such object."
                )
            setattr(scope.attributes[owner], attribute, value)
    for depth, bound in frames.items():
        frame_variables.bind(scope.frames[depth], bound)
