"""The random numbers of ranks whose run was given a seed: alike while a model is made, apart while it is trained.

What a script does before it trains must come out alike on every rank: initial weights (DistributedDataParallel would
copy those of rank 0, `fully_shard` and a model that is not wrapped do not), `random_split`, synthetic data. What it
does while it trains must not: with one dropout mask and one crop for all ranks, a batch over eight of them has the
variety of an eighth. So all ranks begin with the seed itself, as under `set_seed(seed)`, and part when training begins:
when a model is wrapped for several ranks, or at the first step of an optimizer. From there a rank's numbers are those
of (seed, rank); rank 0 goes on as a single process would. Workers of loaders are seeded apart always.

What stays alike: the order of a shuffled loader that no library has spread, since ranks may each take their stretch of
it; `torch.initial_seed()`, from which libraries derive the order of samples; ranks that compute one batch together, as
those of one tensor-parallel model, whose activations a dropout mask of their own would make unlike, and the stages of a
pipeline; workers of their loaders too. A script that seeds by itself, as Trainer does, has decided: its numbers are
left as they are.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.checkpoint.rng import parts_of

_NUM_SEED_BYTES = 8  # at the head of a generator's state


class RandomStreams:
    """Those of one rank in the present cell."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._rank, self._world_size = 0, 1
        self._has_begun = False  # training has: whether ranks part is decided
        self._order: torch.Generator | None = None  # of loaders that nobody has spread
        self._num_steps: Callable[[], int] = lambda: 0

    def install(self, num_steps: Callable[[], int]) -> None:
        """Look at what begins a training; `num_steps`: of optimizers in this cell. Called once, in a rank."""
        self._num_steps = num_steps
        register_optimizer_step_pre_hook(self._before_step)
        patches.SEEDS.apply(
            {
                "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__": self._seeding_workers,
                "torch.distributed.fsdp:fully_shard": self._wrapping,
                "torch.distributed.fsdp:FullyShardedDataParallel.__init__": self._wrapping_self,
            }
        )

    def begin(self, seed: int | None, rank: int, world_size: int) -> None:
        """A new cell; `seed`: None when its run was given none.

        `rank`, `world_size`: among the ranks that have data of their own; those that share a batch are one of them.
        """
        self._seed, self._rank, self._world_size, self._order = seed, rank, world_size, None
        self._has_begun = seed is None or world_size == 1
        if seed is not None:
            from accelerate.utils import set_seed

            set_seed(seed)

    def begin_again(self, seed: int | None) -> None:
        """The next one of several cells that are executed as one, on the same rank."""
        self.begin(seed, self._rank, self._world_size)

    def begin_training(self, parameters: Iterable[Any]) -> None:
        """A model with these parameters is about to be trained: ranks part, unless the cell itself has cut it.

        Of a plan it is known which ranks share a batch; of a cell that cuts its model, that it may be all of them.
        """
        if self._has_begun:
            return
        self._has_begun = True
        # After steps this cell was resumed, and the numbers of its checkpoint are in place.
        if not self._holds or self._num_steps() or (self._is_of_no_plan and _is_cut(parameters)):
            return
        assert self._seed is not None
        self._order = torch.Generator().manual_seed(self._seed)
        if self._rank:
            _seed_apart(_mixed(self._seed, self._rank))

    @property
    def _is_of_no_plan(self) -> bool:
        return not dist.is_initialized() or self._world_size == dist.get_world_size()

    @property
    def _holds(self) -> bool:
        """Whether the cell has not seeded by itself meanwhile."""
        return self._seed is not None and torch.initial_seed() == self._seed

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if not self._has_begun:
            self.begin_training(value for group in optimizer.param_groups for value in group["params"])

    def _wrapping(self, original: Any) -> Any:
        def fully_shard(module: Any, *args: Any, **kwargs: Any) -> Any:
            self._note_wrapped(module)
            return original(module, *args, **kwargs)

        return fully_shard

    def _wrapping_self(self, original: Any) -> Any:
        def __init__(wrapper: Any, module: Any, *args: Any, **kwargs: Any) -> None:
            self._note_wrapped(module)
            original(wrapper, module, *args, **kwargs)

        return __init__

    def _note_wrapped(self, modules: Any) -> None:
        for module in modules if isinstance(modules, list | tuple) else [modules]:
            self.begin_training(module.parameters())

    def _seeding_workers(self, original: Any) -> Any:
        def __init__(iterator: Any, loader: Any) -> None:
            if self._order is not None and self._holds:
                for part in parts_of(loader):
                    if getattr(part, "generator", self) is None and part is not loader:
                        part.generator = self._order
            original(iterator, loader)
            if self._rank and self._holds:
                iterator._base_seed = _mixed(iterator._base_seed, self._rank) >> 1  # a signed number

        return __init__


STREAMS = RandomStreams()


def _is_cut(parameters: Iterable[Any]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def _mixed(seed: int, rank: int) -> int:
    """64 bits that no other seed and rank have: seed + rank would be those of a neighbour."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{rank}".encode(), digest_size=8).digest(), "little")


def _seed_apart(seed: int) -> None:
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    state = torch.Generator().manual_seed(seed).get_state()
    state[:_NUM_SEED_BYTES] = torch.get_rng_state()[:_NUM_SEED_BYTES]  # torch.initial_seed() stays
    torch.set_rng_state(state)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
