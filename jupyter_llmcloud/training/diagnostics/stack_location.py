"""Where is the main thread? Its frames, seen from a side thread, reduced to what a reader of the notebook knows."""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from jupyter_llmcloud.core.run import stacks
from jupyter_llmcloud.core.run.stacks import short_path

MAX_FRAMES = 300
MAX_LINE = 60

_SECTIONS = {
    "torch/utils/data/": "data",
    "/datasets/": "data",
    "/torchvision/datasets/": "data",
    "torch/serialization.py": "checkpoint",
    "torch/distributed/checkpoint/": "checkpoint",
    "/safetensors/": "checkpoint",
    "accelerate/checkpointing.py": "checkpoint",
    "jupyter_llmcloud/training/artifacts.py": "checkpoint",
    "jupyter_llmcloud/training/checkpoint": "checkpoint",
    "torch/distributed/distributed_c10d.py": "collective",
    "torch/autograd/": "backward",
    "torch/nn/parallel/distributed.py": "ddp",
    "torch/nn/modules/module.py": "module",
    "IPython/core/interactiveshell.py": "shell",
}
_EVALUATION = re.compile(r"_?(eval|validat|predict|generate$|test_)", re.IGNORECASE)
_CHECKPOINT = re.compile(r"save_(pretrained|state|model|checkpoint)|load_(state|checkpoint)$", re.IGNORECASE)
_RANKED = ("checkpoint", "evaluation", "data")  # of several phases on one stack, the first

CellNumber = Callable[[str], int | None]


@dataclass(frozen=True)
class StackLocation:
    """Of the main thread.

    Attributes:
        phase: data, compute, checkpoint, evaluation or unknown.
        op: the function of torch.distributed it is in; "backward" in autograd, "ddp" in DistributedDataParallel.
        place: the innermost notebook line; doing: what it does there.
    """

    phase: str = "unknown"
    op: str = ""
    place: str = ""
    doing: str = ""


_kinds: dict[str, str] = {}


def _kind(filename: str) -> str:
    """What a file is to us: one look per file."""
    kind = _kinds.get(filename)
    if kind is None:
        kind = _kinds[filename] = next((kind for part, kind in _SECTIONS.items() if part in filename), "")
    return kind


def main_frame() -> FrameType | None:
    """The innermost frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards, up to the shell that runs the cell."""
    for _ in range(MAX_FRAMES):
        if frame is None or _kind(frame.f_code.co_filename) == "shell":
            return
        yield frame
        frame = frame.f_back


def fingerprint(frame: FrameType | None) -> int:
    """A number that differs when the thread has moved; cheap enough for a look several times a second."""
    marks: list[int] = []
    for _ in range(MAX_FRAMES):
        if frame is None:
            break
        marks += (id(frame.f_code), frame.f_lasti)
        frame = frame.f_back
    return hash(tuple(marks))


def locate(frame: FrameType | None, cell_number: CellNumber, *, closely: bool = False) -> StackLocation:
    """Where the thread is; `closely` also asks the modules on its stack whether they evaluate."""
    phases: set[str] = set()
    op = place = doing = ""
    innermost: FrameType | None = None
    for item in _frames(frame):
        name, kind = item.f_code.co_name, _kind(item.f_code.co_filename)
        number = cell_number(item.f_code.co_filename)
        if number is not None and not place:
            place = stacks.place(number, item.f_code.co_filename, item.f_lineno)
            doing = _what(item, innermost)
        innermost = innermost or item
        if kind == "collective" and name != "wrapper" and not place:
            op = name
        elif kind in ("backward", "ddp") and not op:
            op = kind
        _note_phase(item, name, kind, closely, phases)
    phase = next((phase for phase in _RANKED if phase in phases), "")
    return StackLocation(phase or ("compute" if place else "unknown"), op, place, doing)


def _note_phase(frame: FrameType, name: str, kind: str, closely: bool, phases: set[str]) -> None:
    if kind in ("data", "checkpoint"):
        phases.add(kind)
    elif _CHECKPOINT.match(name):
        phases.add("checkpoint")
    elif _EVALUATION.match(name) or (closely and kind == "module" and _evaluates(frame)):
        phases.add("evaluation")


def _evaluates(frame: FrameType) -> bool:
    module = frame.f_locals.get("self")
    return isinstance(module, torch.nn.Module) and not module.training


def _what(frame: FrameType, innermost: FrameType | None) -> str:
    """What a notebook line is doing: the library function that it has reached, else its text."""
    if innermost is not None:
        return f"{short_path(innermost.f_code.co_filename)}:{innermost.f_lineno} in {innermost.f_code.co_name}"
    return line_text(frame)


def line_text(frame: FrameType) -> str:
    """The source line that a frame is at."""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 1] + "…"


def stack(frame: FrameType | None, cell_number: CellNumber) -> list[str]:
    """A thread's frames as lines, outermost first, below the shell that runs the cell."""
    lines = []
    for item in _frames(frame):
        if item.f_code.co_filename.endswith("torch/distributed/c10d_logger.py"):
            continue  # wraps every collective
        number = cell_number(item.f_code.co_filename)
        name = item.f_code.co_name
        within = "" if name == "<module>" else f" in {name}"
        where = stacks.place(number or 0, item.f_code.co_filename, item.f_lineno)
        text = line_text(item)
        lines.append(f"{where}{within}" + (f": {text}" if text else ""))
    return lines[::-1]
