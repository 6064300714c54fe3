"""Parameters are flattened together and cut (`FullyShardedDataParallel`, the first FSDP): a rank holds its stretch."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import torch
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.parallel.unwrap import plain_name, unwrapped


class FlatShards:
    """The layout that user code makes by wrapping a model, or parts of it, in `FullyShardedDataParallel`."""

    replicated: ClassVar[bool] = False
    fixed_size: ClassVar[str] = (
        "a model that FullyShardedDataParallel has wrapped can be resumed on the same number of ranks only; "
        "one that fully_shard has wrapped (fsdp_version=2) on any."
    )

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether one of its modules is wrapped."""
        return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        """The stretches of this rank as they lie in memory: the wrapper's own state dicts are gathered from all."""
        inner = unwrapped(model)
        return {name: value.detach() for name, value in [*inner.named_parameters(), *inner.named_buffers()]}

    def put(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Fill the stretches of this rank in place."""
        present = self.state(model)
        for name in present.keys() | state.keys():
            there, saved = _shape(present.get(name)), _shape(state.get(name))
            if there != saved:
                raise ResumeMissed(f"{name} was saved with the shape {saved}, now it has {there}: wrap it as before.")
        for name, value in state.items():
            present[name].copy_(value)

    def full_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Gathered through the outermost wrapper: below it, names are those of the whole and values are fragments."""
        # offload_to_cpu does not copy what is on the CPU already, and its memory is given back after the gathering.
        is_elsewhere = any(parameter.device.type != "cpu" for parameter in model.parameters())
        config = FullStateDictConfig(offload_to_cpu=is_elsewhere, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
            state = model.state_dict()
        return {plain_name(model, name): value for name, value in state.items()}

    def shapes(self, model: torch.nn.Module) -> dict[str, tuple[int, ...] | None]:
        """Names alone: the stretch of a rank does not tell the shapes."""
        return dict.fromkeys(plain_name(model, name) for name, _ in model.named_parameters())


def _shape(tensor: torch.Tensor | None) -> list[int] | None:
    return list(tensor.shape) if tensor is not None else None


def settle_all() -> None:
    """Wrappers of this process forget a step that was broken off with its group, and hold their stretches again."""
    for module in [value for value in gc.get_objects() if issubclass(type(value), FullyShardedDataParallel)]:
        if getattr(module, "_is_root", None) is not None:  # it has computed
            _settle(module)


def _settle(module: Any) -> None:
    module.training_state = type(module.training_state).IDLE
    if module._is_root:
        module._post_backward_callback_queued = False
        module._exec_order_data.next_iter()
    handle = module._handle
    if handle is None:
        return
    was_broken = handle._training_state.name != "IDLE" or hasattr(handle.flat_param, "_post_backward_hook_state")
    handle._training_state = type(handle._training_state).IDLE
    handle._ran_pre_backward_hook = handle._needs_pre_backward_unshard = handle._prefetched = False
    handle._post_forward_index = None
    if was_broken and handle.uses_sharded_strategy:
        _drop_gradients(handle)
        handle.reshard(True)
        handle.post_reshard()


def _drop_gradients(handle: Any) -> None:
    """Those of a step that was broken off are of some ranks only, or of whole parameters."""
    flat = handle.flat_param
    if hasattr(flat, "_post_backward_hook_state"):
        flat._post_backward_hook_state[-1].remove()
        del flat._post_backward_hook_state
    if hasattr(flat, "_saved_grad_shard"):
        del flat._saved_grad_shard
    flat._post_backward_called = False
    for parameter in [flat, *(getattr(flat, "_params", None) or ())]:
        parameter.grad = None
