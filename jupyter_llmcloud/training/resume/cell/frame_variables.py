"""The frames of a cell: found without help of the cell, with where they are and what they draw from."""

from __future__ import annotations

import ctypes
import dis
import gc
import inspect
import itertools
import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from types import FrameType, SimpleNamespace
from typing import Any

from jupyter_llmcloud.training.resume.user_code import is_own_frame

_PLAIN = (int, float, complex, str, bytes, range)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_ITERATORS = (enumerate, zip, map, filter, itertools.islice, itertools.chain, itertools.starmap)
_PASSING = ("jupyter_llmcloud.", "torch.utils.data", "accelerate.", "tqdm", "contextlib", "torch.utils._contextlib",
            "lightning.", "lightning_fabric.", "pytorch_lightning.")  # fmt: skip


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


def instructions_of(frames: Iterable[FrameType]) -> list[tuple[str, str]]:
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


# What IPython keeps of earlier cells; dunder names, and ours; .0
_SHELL_NAME = re.compile(r"_+|_i+|_[iod]h|_i?\d+|__.*__|__llmcloud.*|\..*")
_OF_MODULES = ("__builtins__", "__loader__", "__spec__", "__annotations__")
_COMPILERS_NAME = re.compile(r"__(compiled_fn|resume_at|import|builtins_dict_)_.*")


def is_users(name: str) -> bool:
    """Whether a variable of this name is the user's, not the shell's."""
    return _SHELL_NAME.fullmatch(name) is None and not is_compilers(name)


def is_ours(name: str) -> bool:
    """Whether a variable that code writes is none of the user's: of a loop that is tracked, or of a compiler."""
    return name.startswith(("__llmcloud", ".")) or is_compilers(name) or name in _OF_MODULES


def is_compilers(name: str) -> bool:
    """Whether torch.compile has put it among the globals of a function that it has compiled."""
    return _COMPILERS_NAME.fullmatch(name) is not None


def bind(frame: FrameType, values: dict[str, Any]) -> None:
    """Give variables of a frame that runs, or of a generator that waits, their values."""
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


def resume_suspended(frames: list[FrameType], saved: dict[str, dict[str, Any]]) -> None:
    """A generator runs again and is about to deliver: its variables are those it had; each is taken from `saved`."""
    for frame in frames:
        if frame.f_code.co_flags & inspect.CO_GENERATOR and frame.f_code.co_name in saved:
            bind(frame, saved.pop(frame.f_code.co_name))


def keeps_batches(value: Any, depth: int = 0) -> bool:
    """Whether `itertools.cycle` over batches is inside an iterator: it repeats what it has seen, which is not saved."""
    if isinstance(value, itertools.cycle):
        return not _is_plain(value)
    nests = isinstance(value, _ITERATORS) or (depth > 0 and isinstance(value, tuple))
    return nests and depth < 6 and any(keeps_batches(item, depth + 1) for item in gc.get_referents(value))


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether numbers, texts and containers of them are all that something leads to."""
    if value is None or isinstance(value, _PLAIN):
        return True
    is_known = isinstance(value, _CONTAINERS) or (depth < 4 and type(value).__module__ in ("builtins", "itertools"))
    if not is_known or inspect.isgenerator(value) or isinstance(value, type):
        return isinstance(value, type)
    return all(_is_plain(item, depth + 1) for item in gc.get_referents(value))
