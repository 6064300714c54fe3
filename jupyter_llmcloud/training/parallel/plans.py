"""The plans and layouts that a rank knows, and which of them a model has."""

from __future__ import annotations

from typing import Any

import torch

from jupyter_llmcloud.training.parallel import balance, flat_sharded, mesh
from jupyter_llmcloud.training.parallel.ddp import DataParallel
from jupyter_llmcloud.training.parallel.flat_sharded import FlatShards
from jupyter_llmcloud.training.parallel.fully_sharded import FullyShards
from jupyter_llmcloud.training.parallel.pipelined import Stages
from jupyter_llmcloud.training.parallel.plan import Layout, Plan
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.whole import Whole

_DDP = DataParallel()
_PLANS: tuple[Plan, ...] = (_DDP,)
_LAYOUTS: tuple[Layout, ...] = (Stages(), FlatShards(), FullyShards(), _DDP, Whole())  # the first that holds a model


def install() -> None:
    """Take care of the models that code makes parallel from now on. Called once, in a rank."""
    for plan in _PLANS:
        plan.install()
    ACTIVE.install()
    balance.install()


def rebuild(group: Any) -> None:
    """A process group was renewed: prepared models use it. All ranks must call it."""
    flat_sharded.settle_all()
    mesh.renew_fsdp()
    for plan in _PLANS:
        plan.rebuild(group)
    ACTIVE.rebuild(group)


def replicas_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The wrapper that keeps a model alike on all ranks of the world; None when there is none."""
    return _DDP.wrapper_of(model)


def trains_apart(model: torch.nn.Module) -> bool:
    """Whether what keeps a model alike on all ranks is off for now: `no_sync()`, as in Accelerate's LocalSGD."""
    wrapper = replicas_of(model)
    return wrapper is not None and not getattr(wrapper, "require_backward_grad_sync", True)


def layout_of(model: torch.nn.Module) -> Layout:
    """How a model is spread over the ranks."""
    return next(layout for layout in _LAYOUTS if layout.holds(model))
