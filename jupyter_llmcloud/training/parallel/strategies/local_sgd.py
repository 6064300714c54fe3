"""The plan `local-sgd:K`: replicas train apart, and their parameters are averaged every K steps (arXiv 1805.09767)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.strategies.alike import begin_alike
from jupyter_llmcloud.training.parallel.strategies.base import Copy, Models, Strategy, trained
from jupyter_llmcloud.training.parallel.unwrap import unwrapped


class ModelReplica:
    """A model of which every rank trains its own copy.

    Attributes:
        num_steps: of its optimizer, since it was prepared or the group was renewed.
        serial: the same on all ranks that hold it.
        is_told: whether the cell was told that what it saves is this replica alone.
    """

    serial = 0
    is_told = False

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self.num_steps = 0
        self.num_left = 0  # steps since the last exchange

    @property
    def model(self) -> torch.nn.Module | None:
        """None when the cell has let go of it."""
        return self._model()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are trained now: a cell may thaw some later."""
        model = self.model
        return [one for one in model.parameters() if one.requires_grad] if model is not None else []

    def is_trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer has its parameters."""
        own = {id(parameter) for parameter in self.parameters}
        return any(id(parameter) in own for parameter in trained(optimizer))

    def buffers(self) -> list[torch.Tensor]:
        """Running statistics and the like, which replicas have of their own data."""
        model = self.model
        return [value for value in model.buffers() if value.is_floating_point()] if model is not None else []


class LocalSGD(Strategy):
    """Averages the replicas of every prepared model."""

    cuts_models = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replicas: list[ModelReplica] = []
        self._num_made = 0
        self._unequal: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # loaders, and what is said
        self._passes: list[str] = []  # what is said of those that are looped over at present

    def note_unequal(self, loader: Any, words: str) -> None:
        self._unequal[loader] = words

    def pass_over(self, loader: Any, batches: Iterator[Any]) -> Iterator[Any]:
        words = self._unequal.get(loader, "")
        return self._unequal_pass(words, batches) if words else batches

    def _unequal_pass(self, words: str, batches: Iterator[Any]) -> Iterator[Any]:
        self._passes.append(words)
        try:
            yield from batches
        finally:
            self._passes.remove(words)

    def parallelize(self, model: torch.nn.Module, accelerator: Any) -> torch.nn.Module:
        begin_alike(model, self.plan.text)
        model.to(self.device)
        self.replicas = [replica for replica in self.replicas if replica.model is not None]
        replica = self.make_replica(model)
        replica.serial, self._num_made = self._num_made, self._num_made + 1
        self.replicas.append(replica)
        return model

    def make_replica(self, model: torch.nn.Module) -> ModelReplica:
        """What is remembered of a model."""
        return ModelReplica(model)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for replica in self.replicas:
            if replica.is_trained_by(optimizer):
                if self._passes:  # ranks with other numbers of steps would meet in different ones
                    raise UsageError(self._passes[0])
                replica.num_steps += 1
                replica.num_left += 1
                self.stepped(replica)

    def stepped(self, replica: ModelReplica) -> None:
        """A replica has made a step."""
        if replica.num_steps % self.plan.sizes[0] == 0:
            self.exchange(replica)

    def exchange(self, replica: ModelReplica) -> None:
        """All replicas become their mean; every rank must call it."""
        average([parameter.data for parameter in replica.parameters])
        average_buffers(replica.buffers())
        replica.num_left = 0

    def about_to_save(self, model: torch.nn.Module) -> str:
        plain = unwrapped(model)
        own = next((one for one in self.replicas if one.model is not None and unwrapped(one.model) is plain), None)
        if own is None or own.is_told or not own.num_left % self.plan.sizes[0]:
            return ""
        own.is_told = True
        return (
            f"--plan {self.plan.text}: what is saved here is the replica of one rank, which has trained apart since "
            "the ranks met last. They are one model at the end of the cell: --save model on its line keeps that."
        )

    def end(self) -> None:
        """Models of cells that have failed may live on some ranks only, and have made other numbers of steps there."""
        alive = [(replica, model) for replica in self.replicas if (model := replica.model) is not None]
        every: list[dict[int, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, {replica.serial: replica.num_left for replica, _ in alive})
        for replica, _ in alive:
            left = [counts.get(replica.serial) for counts in every]
            if None not in left and any(left):
                self.exchange(replica)

    def broken(self) -> None:
        self.replicas = [replica for replica in self.replicas if replica.model is not None]
        for number, replica in enumerate(self.replicas):  # ranks were at different steps, or one prepared no model
            replica.num_steps, replica.serial = 0, number
        self._num_made = len(self.replicas)

    def state(self, copy: Copy, models: Models) -> Any:
        return {address: [replica.num_steps, replica.num_left] for address, replica in self.addressed(models)}

    def put(self, state: Any, models: Models) -> None:
        for address, replica in self.addressed(models):
            replica.num_steps, replica.num_left = (state or {}).get(address, (0, 0))

    def addressed(self, models: Models) -> Iterator[tuple[str, ModelReplica]]:
        """The replicas of these models, each once."""
        for replica in self.replicas:
            if (own := replica.model) is not None:
                found = (address for address, model in models.items() if unwrapped(model) is unwrapped(own))
                if (address := next(found, None)) is not None:
                    yield address, replica

    def forget(self) -> None:
        self.replicas.clear()
        self._num_made = 0


def average(tensors: list[torch.Tensor]) -> None:
    """The mean over all ranks, in place; tensors of one type travel together."""
    for of_kind in _by_type(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in of_kind])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        unpack(flat, of_kind)


def average_buffers(tensors: list[torch.Tensor]) -> None:
    """The same for what is not trained: of that only what differs between ranks is averaged.

    A constant stays what it is, bit by bit; the sum of masks that hold the lowest number there is would be infinite.
    """
    for of_kind in _by_type(tensors):
        own = torch.cat([tensor.reshape(-1) for tensor in of_kind])
        first = own.clone()
        dist.broadcast(first, 0)
        moved = differences(own, first)
        dist.all_reduce(moved)
        moved /= dist.get_world_size()
        unpack(first + moved, of_kind)


def differences(values: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Of values from others; 0 where they are equal, also where both are infinite."""
    return torch.where(values == first, torch.zeros_like(values), values - first)


def _by_type(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    return list(kinds.values())


def unpack(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy a flat tensor into others, in order."""
    with torch.no_grad():
        for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
            tensor.copy_(part.view_as(tensor))
