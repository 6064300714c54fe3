"""What a plan of parallel training is asked for: one protocol for every way to spread a model over the ranks."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch


class Layout(Protocol):
    """Where the tensors of a model are: all of them on every rank, or a part on each.

    Attributes:
        replicated: every rank is known to hold the same values, so that the first saves them for all.
        fixed_size: why a checkpoint can be resumed on as many ranks only; "" when it can be on any number.
    """

    replicated: ClassVar[bool]
    fixed_size: ClassVar[str]

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether a model is laid out in this way."""

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        """What this rank saves of it in a checkpoint; no other rank takes part."""

    def put(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises ResumeMissed when the model is another one now."""

    def full_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The whole model, gathered by the means of its wrapper; every rank must call it."""

    def shapes(self, model: torch.nn.Module) -> dict[str, tuple[int, ...] | None]:
        """The names of `full_state` with the shapes as far as they are known before it is gathered."""


class Plan(Layout, Protocol):
    """A layout that this package takes care of: it knows each model that is prepared, and outlives its group."""

    def install(self) -> None:
        """Have `prepare` called where code makes a model parallel. Called once, in a rank."""

    def prepare(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Make a model parallel, and remember how it was done."""

    def rebuild(self, group: Any) -> int:
        """Have every prepared model use a renewed process group; all ranks must call it. Returns how many there are."""
