"""A program started by name: one of two ranks that execute a cell with a small model, for a few steps.

    python -m jupyter_llmcloud.training.preflight.rehearse REQUEST.json RANK JOURNAL.jsonl

What a rank does that others must do too is written into its journal before it is done, with the line of the cell, so
that whoever reads the journals of both sees where they part.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from jupyter_llmcloud.core.preflight.findings import LEFT, LOADER, LOADER_END, POINT, PROBLEM, TOGETHER
from jupyter_llmcloud.system.processes import end_with_parent
from jupyter_llmcloud.training.preflight.program import (
    EnoughSeen,
    Program,
    do_as_ranks,
    shorten_loaders,
    shorten_trainers,
    uses,
)

STEPS = 12  # of optimizers, for a cell whose loops have no loader that ends
LAYERS = 2
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "new_group"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list"),
)
POINT_TO_POINT = ("send", "recv", "send_object_list", "recv_object_list")
_OBJECTS = {"all_gather_object": "obj", "broadcast_object_list": "object_list", "gather_object": "obj"}


class Journal:
    """What this rank does, one line of JSON each, written at once."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - as long as the process
        self._number = 0
        self._inside = threading.local()
        self.is_enough = False  # the cell is ended from outside: what it leaves it does not leave by itself
        self.where: Callable[[], str] = str

    def write(self, kind: str, what: str, **more: Any) -> int:
        """Add a line; returns its number."""
        self._number += 1
        about = {"number": self._number, "kind": kind, "what": what, "where": self.where(), **more}
        self._file.write(json.dumps(about) + "\n")
        return self._number

    @contextlib.contextmanager
    def together(self, what: str, kind: str = TOGETHER, **more: Any) -> Iterator[None]:
        """The block is something that ranks do together; what it does inside is not written."""
        if getattr(self._inside, "is_inside", False):
            yield
            return
        number = self.write(kind, what, **more)
        self._inside.is_inside = True
        try:
            yield
            self._file.write(json.dumps({"ended": number}) + "\n")
        finally:
            self._inside.is_inside = False

    @contextlib.contextmanager
    def in_pass(self, loader: Any) -> Iterator[None]:
        """The block is a pass over a loader; one within what ranks do together may be of another length on each."""
        try:
            num_batches = len(loader)
        except TypeError:  # a stream does not know
            num_batches = None
        if num_batches is None or getattr(self._inside, "is_inside", False):
            yield
            return
        number = self.write(LOADER, str(num_batches))
        try:
            yield
            self.write(LOADER_END, str(number))
        except GeneratorExit:
            if not self.is_enough:
                self.write(LOADER_END, str(number), shape=LEFT)
            raise


def watch_collectives(journal: Journal) -> None:
    """Write down each collective of Python, the backward passes of DDP, and objects that cannot be sent."""
    for name in COLLECTIVES:
        setattr(dist, name, _watched(journal, name, getattr(dist, name)))
    for name in POINT_TO_POINT:
        setattr(dist, name, _watched_point(journal, name, getattr(dist, name)))
    from torch.nn.parallel import DistributedDataParallel

    made = list[Any]()
    build, backward = DistributedDataParallel.__init__, torch.Tensor.backward
    send_buffers = DistributedDataParallel._sync_buffers

    @functools.wraps(build)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(None)
        with journal.together("DistributedDataParallel()"):
            build(self, *args, **kwargs)

    @functools.wraps(backward)
    def passed_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not made:
            return backward(self, *args, **kwargs)
        with journal.together("backward()"):
            return backward(self, *args, **kwargs)

    @functools.wraps(send_buffers)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with journal.together("the forward pass of a DDP model with buffers"):
            return send_buffers(self, *args, **kwargs)

    DistributedDataParallel._sync_buffers = forward  # type: ignore[method-assign]
    DistributedDataParallel.__init__ = built  # type: ignore[method-assign]
    torch.Tensor.backward = passed_back  # type: ignore[method-assign]
    _watch_join(journal)


def _watch_join(journal: Journal) -> None:
    """Within torch's `Join` a rank that has come to its end answers for what the others still do."""
    from torch.distributed.algorithms import Join

    enter, leave = Join.__enter__, Join.__exit__
    entered = list[contextlib.ExitStack]()

    @functools.wraps(enter)
    def begin(self: Any) -> Any:
        entered.append(contextlib.ExitStack())
        entered[-1].enter_context(journal.together("Join()"))
        return enter(self)

    @functools.wraps(leave)
    def end(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        with entered.pop():
            return leave(self, kind, error, trace)

    Join.__enter__, Join.__exit__ = begin, end  # type: ignore[method-assign]


def _watched(journal: Journal, name: str, original: Any) -> Any:
    order = [*inspect.signature(original).parameters]

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(order, args, strict=False), **kwargs)
        group = given.get("group")
        if group is dist.GroupMember.NON_GROUP_MEMBER:  # which waits for nobody
            return original(*args, **kwargs)
        if name in _OBJECTS:
            _check_objects(journal, name, given)
        ranks = dist.get_process_group_ranks(group) if group is not None else []
        is_split = given.get("input_split_sizes") or given.get("output_split_sizes")  # by each rank as it likes
        shape = "" if is_split else _shape(name, args, kwargs)
        with journal.together(f"{name}()", shape=shape, group=ranks):
            return original(*args, **kwargs)

    return collective


def _watched_point(journal: Journal, name: str, original: Any) -> Any:
    @functools.wraps(original)
    def point(*args: Any, **kwargs: Any) -> Any:
        with journal.together(f"{name}()", POINT):
            return original(*args, **kwargs)

    return point


def _shape(name: str, args: Any, kwargs: Any) -> str:
    if name in _OBJECTS or name in ("scatter_object_list", "barrier", "new_group", "gather", "scatter", "all_to_all"):
        return ""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
    return f"{str(tensors[-1].dtype).removeprefix('torch.')} {list(tensors[-1].shape)}" if tensors else ""


def _check_objects(journal: Journal, name: str, given: dict[str, Any]) -> None:
    if name == "broadcast_object_list" and dist.get_rank() != (given.get("src") or given.get("group_src") or 0):
        return  # only the source's are sent
    sent = given.get(_OBJECTS[name])
    for each in sent if isinstance(sent, list) else [sent]:
        try:
            pickle.dumps(each)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            about = f"{name}() is given an object of type {type(each).__name__} that cannot be pickled ({said})"
            journal.write(PROBLEM, f"{about}: the other ranks wait for it. Send plain values")


def shrink_models() -> None:
    """Models of transformers are made with two layers."""
    from transformers import PreTrainedModel

    make = PreTrainedModel.__init__

    @functools.wraps(make)
    def small(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if (getattr(config, "num_hidden_layers", 0) or 0) > LAYERS:
            config.num_hidden_layers = LAYERS
            if isinstance(kinds := getattr(config, "layer_types", None), list):
                config.layer_types = kinds[:LAYERS]
        make(self, config, *args, **kwargs)

    PreTrainedModel.__init__ = small  # type: ignore[method-assign]


def main(request_file: str, rank_text: str, journal_file: str) -> None:
    """Execute the cell as a rank; the journal's last line says how it ended."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    end_with_parent(request["alive"], Path(request_file).parent)
    rank, world_size = int(rank_text), request["world_size"]
    journal = Journal(journal_file)
    _join(request, rank, world_size)
    program = Program(request, rank, world_size)
    journal.where = program.where
    do_as_ranks(request, program.run)
    watch_collectives(journal)
    shorten_loaders(program, on_pass=journal.in_pass)
    if uses(request, "transformers"):
        shrink_models()
        shorten_trainers()
    made = list[None]()

    def count(*_: Any) -> None:
        made.append(None)
        journal.write("step", str(len(made)))
        if len(made) >= STEPS:
            journal.is_enough = True
            raise EnoughSeen

    def begin() -> None:
        register_optimizer_step_post_hook(count)

    try:
        program.execute(begin)
        journal.write("end", "it has come to the end of the cell")
    except EnoughSeen:
        journal.write("end", "", enough=True)
    except BaseException as error:  # also a SystemExit
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        journal.write("end", f"it failed in {program.where_failed(error) or 'a library'} with {said}", failed=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a group with models on it may not come down


def _join(request: dict[str, Any], rank: int, world_size: int) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": request["precision"]}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(request["store"], world_size), rank=rank, world_size=world_size
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
