"""Launchers in a cell: the ranks of its world are the processes that they would start."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.multiprocessing

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.run import Run


class _Ended:
    """What `mp.spawn(join=False)` returns: processes that have ended."""

    def join(self, timeout: float | None = None, grace_period: float | None = None) -> bool:
        return True


def adopt(run: Run) -> None:
    """Have launchers call the function on this rank, once: `notebook_launcher(train, num_processes=2)` as pasted.

    A function of a cell that is given to `torch.multiprocessing.spawn`, or to `start_processes`, likewise. Functions of
    modules are started as ever.
    """
    spawn, start = torch.multiprocessing.spawn, torch.multiprocessing.start_processes

    def notebook_launcher(
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
        num_processes: int | None = None,
        mixed_precision: str = "no",
        *rest: Any,
        **options: Any,
    ) -> Any:
        compare_number("notebook_launcher: num_processes", num_processes, run)
        with _precision(mixed_precision):
            return function(*args)

    def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> Any:
        return notebook_launcher(function, args, num_processes)

    def here(original: Callable[..., Any]) -> Callable[..., Any]:
        def spawn_here(
            fn: Callable[..., Any],
            args: tuple[Any, ...] = (),
            nprocs: int = 1,
            join: bool = True,
            daemon: bool = False,
            start_method: str = "spawn",
        ) -> Any:
            if not is_of_cell(fn):
                return original(fn, args, nprocs, join, daemon, start_method)
            if nprocs != run.world_size:
                raise ValueError(
                    f"spawn(nprocs={nprocs}): in a cell the ranks of its world are the processes, and there are "
                    f"{run.world_size}. Say nprocs=world_size" + _or_resize(nprocs)
                )
            fn(run.rank, *args)
            return None if join else _Ended()

        return spawn_here

    patches.LAUNCHERS.apply_by_name(
        {
            "notebook_launcher": notebook_launcher,
            "debug_launcher": debug_launcher,
            "spawn": here(spawn),
            "start_processes": here(start),
        }
    )


def is_of_cell(function: Any) -> bool:
    """Whether a cell has defined it, or the function that it is a part of."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) == "__main__"


def compare_number(name: str, wanted: int | None, run: Run) -> None:
    """Say how many processes there are, where a launcher is told of another number."""
    if wanted not in (None, run.world_size) and run.rank == 0:
        print(
            f"{name}={wanted}, but a cell runs on the ranks of its world, and there are {run.world_size}"
            + (f". For another number: %world resize {wanted}" if wanted else "."),
            file=sys.stderr,
        )


def _or_resize(num_ranks: int) -> str:
    """Nothing where a script has counted the GPUs of a machine that has none."""
    return f", or change their number first: %world resize {num_ranks}" if num_ranks > 0 else "."


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = os.environ["ACCELERATE_MIXED_PRECISION"]
    if name != "no":
        os.environ["ACCELERATE_MIXED_PRECISION"] = name
    try:
        yield
    finally:
        os.environ["ACCELERATE_MIXED_PRECISION"] = before
