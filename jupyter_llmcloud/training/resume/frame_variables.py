"""The frames of a cell and their small variables: found without help of the cell, taken as values, put back."""

from __future__ import annotations

import ctypes
import dis
import gc
import inspect
import itertools
import re
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from types import FrameType, GeneratorType, SimpleNamespace
from typing import Any

import torch

from jupyter_llmcloud.training.checkpoint.serialization import NotPlain, encode_variable, put_back
from jupyter_llmcloud.training.resume.user_code import is_own_frame
from jupyter_llmcloud.training.shell.failure_locals import holds_secret

_ITERATORS = (enumerate, zip, map, filter, itertools.islice, itertools.chain, itertools.starmap)
_PASSING = ("jupyter_llmcloud.", "torch.utils.data", "accelerate.", "tqdm", "contextlib", "torch.utils._contextlib",
            "lightning.", "lightning_fabric.", "pytorch_lightning.")  # fmt: skip
SAME_AS = "__llmcloud_same_as__"


def user_frames(namespace: Mapping[str, Any]) -> list[FrameType]:
    """The frames of the notebook's own code that led here, outermost first."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is namespace or is_own_frame(frame):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1] or [_after_the_end(namespace)]


def _after_the_end(namespace: Mapping[str, Any]) -> Any:
    """What stands for the cell's own frame when it has ended."""
    return SimpleNamespace(f_locals=namespace, f_code=SimpleNamespace(co_name="<module>", co_flags=0))


def names_of(frames: Iterable[FrameType]) -> list[str]:
    """Which functions run; comparable between attempts."""
    return [frame.f_code.co_name for frame in frames]


def place_in(frames: Iterable[FrameType]) -> list[tuple[str, str]]:
    """Where in its code each of the frames is; the same when the cell is executed again."""
    return [(frame.f_code.co_name, _instruction(frame)) for frame in frames]


def _instruction(frame: FrameType) -> str:
    code = frame.f_code
    return f"{zlib.crc32(code.co_code):x} {frame.f_lasti}" if hasattr(code, "co_code") else ""


def unfollowed_loop() -> str:
    """What draws batches in a loop that is not followed; "" when the user's own code asks for the next one by hand."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if is_own_frame(frame):
            by_loop = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "FOR_ITER"
            return f"{frame.f_code.co_name} (line {frame.f_lineno})" if by_loop else ""
        if not name.startswith(_PASSING):
            return name
        frame = frame.f_back
    return ""


def trainer_runs() -> bool:
    """Whether transformers' Trainer drives the loop, which keeps its own state."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("transformers.trainer"):
            return True
        frame = frame.f_back
    return False


def variables(frames: list[FrameType], given: set[str]) -> dict[str, Any]:
    """The small plain variables by address; `given` are names that a rank's namespace starts with.

    Of several names for one list, only the first holds its items.
    """
    found: dict[str, Any] = {}
    first_names: dict[int, str] = {}
    for depth, frame in enumerate(frames):
        for name, value in list(frame.f_locals.items()):
            if not is_users(name) or name in given or isinstance(value, type) or callable(value):
                continue
            if holds_secret(value):
                continue
            address = f"{depth} {name}"
            if id(value) in first_names:
                found[address] = {SAME_AS: first_names[id(value)]}
                continue
            try:
                found[address] = encode_variable(value)
            except NotPlain:
                continue
            if isinstance(value, list | dict | set | deque | torch.Tensor):
                first_names[id(value)] = address
    return found


_SHELL_NAME = re.compile(r"_+|_i+|_[iod]?h|_i?\d+|__.*")  # what IPython keeps of earlier cells; dunder names


def is_users(name: str) -> bool:
    """Whether a variable of this name is the user's, not the shell's."""
    return _SHELL_NAME.fullmatch(name) is None


def changed(now: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Addresses of the variables that are not as they were when the training began."""
    return [address for address, value in now.items() if address not in first or not _equal(value, first[address])]


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):
        return False  # tensors


def set_variables(frames: list[FrameType], saved: dict[str, Any]) -> None:
    """Put variables back into the frames that run now."""
    filled: set[int] = set()
    restored: dict[str, Any] = {}
    for depth, frame in enumerate(frames):
        present = frame.f_locals
        bound = {}
        for address, value in saved.items():
            at, _, name = address.partition(" ")
            if int(at) != depth:
                continue
            if isinstance(value, dict) and SAME_AS in value:
                if value[SAME_AS] in restored:
                    bound[name] = restored[address] = restored[value[SAME_AS]]
                continue
            anew, restored[address] = put_back(value, present.get(name), filled)
            if anew:
                bound[name] = restored[address]
        _bind(frame, bound)


def _bind(frame: FrameType, values: dict[str, Any]) -> None:
    frame.f_locals.update(values)
    # A function keeps its variables elsewhere.
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def used_values(frames: list[FrameType]) -> list[Any]:
    """The values of the variables that the code which runs now mentions; a namespace holds those of other cells too."""
    return [value for frame in frames for name, value in list(frame.f_locals.items()) if name in mentioned(frame)]


def mentioned(frame: FrameType) -> set[str]:
    """The names that the code of a frame uses."""
    code = frame.f_code
    if not hasattr(code, "co_names"):
        return set()  # the cell has ended
    return {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}


# --- iterators that are not running now ------------------------------------------------------------------------------


def suspended(frames: list[FrameType], given: set[str]) -> dict[str, dict[str, Any]]:
    """The variables of the cell's generators that wait in a variable, by function name."""
    found: dict[str, dict[str, Any]] = {}
    pending = [value for frame in frames for value in list(frame.f_locals.values())]
    while pending:
        value = pending.pop()
        waits = isinstance(value, GeneratorType) and value.gi_frame is not None and not value.gi_running
        if waits and value.gi_frame.f_globals is frames[0].f_globals and value.gi_code.co_name not in found:
            found[value.gi_code.co_name] = variables([value.gi_frame], given)
            pending += [*value.gi_frame.f_locals.values()]
    return found


def resume_suspended(frames: list[FrameType], saved: dict[str, dict[str, Any]]) -> None:
    """A generator runs again and is about to deliver: its variables are those it had; each is taken from `saved`."""
    for frame in frames:
        if frame.f_code.co_flags & inspect.CO_GENERATOR and frame.f_code.co_name in saved:
            set_variables([frame], saved.pop(frame.f_code.co_name))


def keeps_batches(value: Any, depth: int = 0) -> bool:
    """Whether `itertools.cycle` is inside an iterator: it repeats what it has seen, which is not saved."""
    if isinstance(value, itertools.cycle):
        return True
    nests = isinstance(value, _ITERATORS) or (depth > 0 and isinstance(value, tuple))
    return nests and depth < 6 and any(keeps_batches(item, depth + 1) for item in gc.get_referents(value))
