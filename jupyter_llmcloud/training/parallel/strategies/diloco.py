"""The plan `diloco:K`: replicas train apart for K steps; what they have moved by is the gradient of an outer step.

The outer optimizer is Nesterov's momentum (DiLoCo, arXiv 2311.08105). A model may be sent in fragments that take turns,
each of them applied some steps after it was sent, so that training goes on meanwhile (Streaming DiLoCo, 2501.18512);
outer gradients may travel in 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.core.parallel.outer_schedule import OuterSchedule, fragments_of
from jupyter_llmcloud.training.parallel.strategies.base import Copy, Models
from jupyter_llmcloud.training.parallel.strategies.local_sgd import LocalSGD, ModelReplica, average_buffers, unpack
from jupyter_llmcloud.training.parallel.strategies.quantized_mean import quantized_mean

_KEPT = 0.5  # of what a replica learns while its fragment is under way, as in Streaming DiLoCo


class Fragment:
    """Some parameters of a replica, with what all replicas have agreed on.

    Attributes:
        parameters: of this rank.
        agreed: their last common value, flat, float32.
        momentum: of the outer optimizer.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.restart()

    def restart(self) -> None:
        """All ranks hold the same now."""
        self.agreed = self.flat()
        self.momentum = torch.zeros_like(self.agreed)
        self._sent: torch.Tensor | None = None
        self._work: Any = None

    def flat(self) -> torch.Tensor:
        """The parameters of this rank."""
        return torch.cat([parameter.detach().reshape(-1).float() for parameter in self.parameters])

    def send(self, bits: int) -> None:
        """Begin to average what the replicas have moved by."""
        moved = self.agreed - self.flat()
        if bits == 8:
            self._sent, self._work = quantized_mean(moved), None
        else:
            self._sent, self._work = moved, dist.all_reduce(moved, async_op=True)

    def mean(self) -> torch.Tensor | None:
        """The outer gradient that was sent; None when none is under way."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            assert self._sent is not None
            self._sent /= dist.get_world_size()
        return self._sent

    def apply(self, learning_rate: float, momentum: float, kept: float) -> None:
        """The outer step; `kept` is the share of this rank's own progress that it keeps."""
        gradient = self.mean()
        if gradient is None:
            return
        self._sent = None
        self.momentum.mul_(momentum).add_(gradient)
        self.agreed -= learning_rate * (gradient + momentum * self.momentum)
        new = self.agreed if not kept else torch.lerp(self.agreed, self.flat(), kept)
        unpack(new, [parameter.data for parameter in self.parameters])

    def state(self) -> dict[str, torch.Tensor]:
        """What is to be saved."""
        found = {"agreed": self.agreed, "momentum": self.momentum}
        return found if (sent := self.mean()) is None else {**found, "sent": sent}

    def put(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        self.agreed.copy_(state["agreed"])
        self.momentum.copy_(state["momentum"])
        self._work, sent = None, state.get("sent")
        self._sent = sent.to(self.agreed.device) if sent is not None else None

    def forget_sent(self) -> None:
        """Its group is gone."""
        self._sent = self._work = None


class FragmentedReplica(ModelReplica):
    """A replica in fragments."""

    def __init__(self, model: torch.nn.Module, num_fragments: int) -> None:
        super().__init__(model)
        parameters = self.parameters
        parts = fragments_of([parameter.numel() for parameter in parameters], num_fragments)
        self.fragments = [Fragment([parameters[at] for at in part]) for part in parts]


class DiLoCo(LocalSGD):
    """Outer steps on every prepared model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        settings = self.plan.settings
        self._bits: int = settings["bits"]
        self._outer = settings["outer-lr"], settings["momentum"]
        self._schedule = OuterSchedule(self.plan.sizes[0], settings["fragments"], settings["delay"])
        self._kept = _KEPT if settings["delay"] else 0.0

    def make_replica(self, model: torch.nn.Module) -> ModelReplica:
        return FragmentedReplica(model, self._schedule.fragments)

    def stepped(self, replica: ModelReplica) -> None:
        assert isinstance(replica, FragmentedReplica)
        for number in self._schedule.sent(replica.num_steps):
            if number < len(replica.fragments):
                replica.fragments[number].send(self._bits)
        for number in self._schedule.applied(replica.num_steps):
            if number < len(replica.fragments):
                replica.fragments[number].apply(*self._outer, self._kept)
                average_buffers(replica.buffers())

    def exchange(self, replica: ModelReplica) -> None:
        """At the end of a cell: what is under way is applied, then a last outer step of what was trained since."""
        assert isinstance(replica, FragmentedReplica)
        complete = self._schedule.sent(replica.num_steps)  # an outer step more would move them by momentum alone
        for number, fragment in enumerate(replica.fragments):
            if number in complete:
                fragment.apply(*self._outer, 0.0)
                continue
            fragment.apply(*self._outer, self._kept)
            fragment.send(self._bits)
            fragment.apply(*self._outer, 0.0)
        average_buffers(replica.buffers())
        replica.num_left = 0

    def broken(self) -> None:
        super().broken()
        for replica in self.replicas:
            if isinstance(replica, FragmentedReplica):
                for fragment in replica.fragments:
                    fragment.forget_sent()

    def state(self, copy: Copy, models: Models) -> Any:
        found = {}
        for address, replica in self.addressed(models):
            assert isinstance(replica, FragmentedReplica)
            fragments = [
                {name: copy(f"outer {address} {number} {name}", value) for name, value in fragment.state().items()}
                for number, fragment in enumerate(replica.fragments)
            ]
            found[address] = [replica.num_steps, replica.num_left, fragments]
        return found

    def put(self, state: Any, models: Models) -> None:
        if state is None:  # the models come from another plan, or from one rank: all hold the same
            for replica in self.replicas:
                assert isinstance(replica, FragmentedReplica)
                for fragment in replica.fragments:
                    fragment.restart()
            return
        for address, replica in self.addressed(models):
            assert isinstance(replica, FragmentedReplica)
            if address in state:
                replica.num_steps, replica.num_left, fragments = state[address]
                for fragment, saved in zip(replica.fragments, fragments, strict=True):
                    fragment.put(saved)
