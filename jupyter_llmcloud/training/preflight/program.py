"""A cell and what it needs of earlier ones, executed in a process that is thrown away."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cloudpickle
import torch

from jupyter_llmcloud.training.group import process_group
from jupyter_llmcloud.training.run import Run

BATCHES = 2  # batches that a loader gives before it ends
BATCHES_OF_STEPS = 256  # at most, where the cell trains on them: an optimizer may step after many


class EnoughSeen(BaseException):
    """The cell has come as far as it had to; no `except Exception` of its own holds this up."""


class QuietRun:
    """In place of the `run` of a rank: nothing is logged."""

    id, name, is_on_all_ranks, should_stop, resumed_step = "preflight", "preflight", True, False, 0

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder

    def log(self, *_: Any, **__: Any) -> None:
        """Forgets it."""

    progress = checkpoint = log

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps."""
        return iter(range(total))


@dataclass(frozen=True)
class _PreflightGroup:
    """In place of the group of a world: the default group of this process."""

    rank: int
    world_size: int
    address: str = ""

    def watch_sockets(self) -> AbstractContextManager[None]:
        """Nobody is released from it."""
        return nullcontext()


class Program:
    """The parts of a request: each a file name, the lines above it and its code; of earlier cells, what else they had.

    Attributes:
        names: the files whose lines are the user's.
        namespace: what the cell finds.
        run: that the cell finds.
        is_at_cell: whether the cell itself is executed by now, and not what it needs of earlier ones.
    """

    def __init__(self, request: Mapping[str, Any], rank: int, world_size: int) -> None:
        self.parts: Sequence[Mapping[str, Any]] = request["parts"]
        self.names = {part["filename"]: part["shown"] for part in self.parts}
        about = {"rank": rank, "local_rank": rank, "world_size": world_size, "device": torch.device("cpu")}
        self.run = QuietRun(rank, world_size, Path(request["run_folder"]))
        self.namespace: dict[str, Any] = {**about, "run": self.run, "display": print, "__name__": "__main__"}
        self._of_cell = {"arguments": request["arguments"], "precision": request["precision"]}
        if request["folder"]:
            os.chdir(request["folder"])
            sys.path.insert(0, request["folder"])
        if request["pushed"]:
            self.namespace.update(cloudpickle.loads(Path(request["pushed"]).read_bytes()))
        main = sys.modules["__main__"].__dict__
        main.update(self.namespace)
        self.namespace = main
        self.is_at_cell = False

    def execute(self, before_last: Callable[[], None]) -> None:
        """Every part in order; `before_last` is called when only the cell itself is left."""
        for number, part in enumerate(self.parts):
            self._give(self._of_cell | dict(part))
            text = "\n" * part["line_offset"] + part["code"]
            linecache.cache[part["filename"]] = (len(text), None, text.splitlines(keepends=True), part["filename"])
            if number == len(self.parts) - 1:
                self.is_at_cell = True
                before_last()
            code = compile(text, part["filename"], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            found = eval(code, self.namespace)  # the user's own cell
            if inspect.iscoroutine(found):
                asyncio.run(found)

    def _give(self, part: Mapping[str, Any]) -> None:
        """What a run finds in its process: each earlier cell had arguments and a precision of its own."""
        sys.argv = [self.parts[-1]["filename"], *part["arguments"]]
        os.environ["ACCELERATE_MIXED_PRECISION"] = part["precision"]

    def most_batches(self) -> int:
        """How many batches a pass over a loader gives that nothing has been trained on yet.

        A loop that takes batches out by hand needs those of a whole step first.
        """
        return BATCHES_OF_STEPS if self.is_at_cell and "next(" in self.parts[-1]["code"] else BATCHES

    def where(self) -> str:
        """The innermost line of the user's code that is being executed."""
        frame = sys._getframe(1)
        while frame is not None:
            if shown := self.names.get(frame.f_code.co_filename):
                return f"{shown}, line {frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def where_failed(self, error: BaseException) -> str:
        """The innermost line of the user's code in a traceback."""
        lines = [
            f"{self.names[frame.f_code.co_filename]}, line {number}"
            for frame, number in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename in self.names
        ]
        return lines[-1] if lines else ""


def shorten_loaders(
    program: Program,
    on_pass: Callable[[Any], AbstractContextManager[None]] = lambda _: nullcontext(),
    on_batch: Callable[[Any], None] = lambda _: None,
) -> None:
    """Have each pass over a DataLoader end after a few batches, which are read in this process.

    A pass that the cell itself trains on goes on until its optimizer has stepped often enough.

    Args:
        on_pass: is given each loader that is read; what it returns is entered until the pass has come to its end, and
            left by GeneratorExit where the cell ends it.
        on_batch: is given each batch.
    """
    loader = torch.utils.data.DataLoader
    make, iterate = loader.__init__, loader.__iter__
    backwards = _count_backwards()

    @functools.wraps(make)
    def here(self: Any, *args: Any, **settings: Any) -> None:
        bound = inspect.signature(make).bind(self, *args, **settings)
        for name in ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context", "pin_memory"):
            bound.arguments.pop(name, None)
        make(*bound.args, **bound.kwargs)

    def some(self: Any) -> Any:
        before = len(backwards)
        with on_pass(self):
            for number, batch in enumerate(iterate(self)):
                trains = program.is_at_cell and len(backwards) > before
                if number >= (BATCHES_OF_STEPS if trains else program.most_batches()):
                    return
                on_batch(batch)
                yield batch

    loader.__init__ = here  # type: ignore[method-assign]
    loader.__iter__ = some  # type: ignore[method-assign]


def _count_backwards() -> list[None]:
    """A list that grows by one at each backward pass from now on."""
    made = list[None]()
    backward = torch.autograd.backward

    @functools.wraps(backward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(None)
        return backward(*args, **kwargs)

    torch.autograd.backward = counted
    return made


def shorten_trainers(steps: int = BATCHES) -> None:
    """Have a Trainer of transformers end after a few steps, saving and reporting nothing."""
    from transformers import Trainer

    train = Trainer.train

    @functools.wraps(train)
    def short(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.args.max_steps = steps
        self.args.save_strategy = "no"
        self.args.report_to = []
        return train(self, *args, **kwargs)

    Trainer.train = short  # type: ignore[method-assign]


def uses(request: Mapping[str, Any], *words: str) -> bool:
    """Whether the text names one of them."""
    return any(word in part["code"] for part in request["parts"] for word in words)


def do_as_ranks(request: Mapping[str, Any], run: QuietRun) -> None:
    """Have a script that was pasted into a cell find here what it finds on a rank.

    `init_process_group` finds a group, launchers call their function, one Accelerator follows another.
    """
    group = cast(process_group.WorldGroup, _PreflightGroup(run.rank, run.world_size))
    process_group.adopt(lambda: group)
    if uses(request, "accelerate", "spawn", "start_processes"):  # importing it takes a while
        from jupyter_llmcloud.training.integrations import launchers, uneven_inputs

        launchers.adopt(cast(Run, run))
        uneven_inputs.install()
        _renew_accelerators()


def _renew_accelerators() -> None:
    """An Accelerator may have another precision than the one before; PartialState() alone knows of other ranks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    make, begin = Accelerator.__init__, PartialState.__init__

    @functools.wraps(make)
    def anew(self: Any, *args: Any, **kwargs: Any) -> None:
        if AcceleratorState._shared_state:
            AcceleratorState._reset_state()
        make(self, *args, **kwargs)

    @functools.wraps(begin)
    def on_cpu(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        begin(self, True, **kwargs)

    Accelerator.__init__, PartialState.__init__ = anew, on_cpu
