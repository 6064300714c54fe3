"""Every rank has a whole model of its own: one that is not wrapped, or only compiled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from jupyter_llmcloud.training.checkpoint import sharded_tensors
from jupyter_llmcloud.training.parallel.unwrap import plain_name, unwrapped


class Whole:
    """The layout of a model that nothing has spread; whether the ranks agree is not known."""

    replicated: ClassVar[bool] = False
    fixed_size: ClassVar[str] = ""

    def holds(self, model: torch.nn.Module) -> bool:
        """Any model can be taken as it is."""
        return True

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        """Its state dict."""
        return dict(unwrapped(model).state_dict())

    def put(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Load its state dict."""
        unwrapped(model).load_state_dict(sharded_tensors.spread(state, lambda _: None))

    def full_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Its state dict under the names of the plain model."""
        return {plain_name(model, name): value for name, value in model.state_dict().items()}

    def shapes(self, model: torch.nn.Module) -> dict[str, tuple[int, ...] | None]:
        """Those of its state dict."""
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        return {plain_name(model, name): tuple(value.shape) for name, value in tensors.items()}
