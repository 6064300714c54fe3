"""What a plan other than `ddp` does to an ordinary Accelerate body: one protocol, with what most of them need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from jupyter_llmcloud.core.parallel.plan import ParallelPlan

Copy = Callable[[str, torch.Tensor], torch.Tensor]
Models = Mapping[str, torch.nn.Module]  # by their addresses in a checkpoint


class Strategy:
    """Carries out a plan in one cell.

    Args:
        plan: what was asked for; it fits the world.
        rank, world_size: of this process.
        device: where its model is.

    Attributes:
        cuts_models: whether a rank has a part of each model only, not one that it could save alone.
        cuts_tensors: whether that is a part of each tensor, of which the ranks together have the whole.
        is_asynchronous: whether ranks wait for each other nowhere, so that the first saves without asking the others.
    """

    cuts_models = True
    cuts_tensors = False
    is_asynchronous = False

    def __init__(self, plan: ParallelPlan, rank: int, world_size: int, device: torch.device) -> None:
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def begin(self, cell_key: str) -> None:
        """A cell begins, which has this name on all ranks; the strategy may have served earlier ones."""

    def close(self) -> None:
        """The cell has ended, however."""

    def leave(self) -> None:
        """Another plan takes its place: what it holds of its models is given back."""

    @property
    def data_rank(self) -> tuple[int, int]:
        """Which part of the data this rank gets, of how many."""
        count = self.plan.num_data_ranks(self.world_size)
        return self.rank * count // self.world_size, count

    def parallelize(self, model: torch.nn.Module, accelerator: Any) -> torch.nn.Module:
        """Spread a model; its parameters may be other ones afterwards. All ranks must call it. Raises UsageError."""
        raise NotImplementedError

    def adopt_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of a spread model is about to be used; its parameters are those of now."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""

    def note_unequal(self, loader: Any, words: str) -> None:
        """A loader has more batches for some ranks than for others; `words` say what comes of that."""

    def pass_over(self, loader: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """What a loop over a loader gets."""
        return batches

    def about_to_save(self, model: torch.nn.Module) -> str:
        """What is to be said of a model that the cell itself is about to save; "" for nothing."""
        return ""

    def end(self) -> None:
        """The cell has come to its end on every rank: they hold one model afterwards."""

    def state(self, copy: Copy, models: Models) -> Any:
        """What a checkpoint needs besides models and optimizers, with tensors copied by `copy(name, tensor)`.

        `models`: those that it holds. Others, of earlier cells, a process that replaces this one may not have.
        """
        return None

    def put(self, state: Any, models: Models) -> None:
        """The inverse of `state`, of the same plan on as many ranks; None: the models have come from elsewhere."""

    def broken(self) -> None:
        """The group of the world was renewed: what was under way is lost."""

    def forget(self) -> None:
        """A rank of the renewed world has no part of the models there are: they are trained together no more."""


def trained(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """The parameters of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


@runtime_checkable
class Asynchronous(Protocol):
    """A strategy whose workers meet at its own servers, not in the process group, where they meet at all."""

    def shared_pass(self, loader: Any, own: Iterator[Any]) -> Iterator[Any]:
        """A pass over a loader, whose batches of this worker are `own`."""

    def gathered(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The value of every worker that trains, in the order of ranks; waits for them."""

    def wait_for_everyone(self) -> None:
        """Wait for every worker that trains."""
