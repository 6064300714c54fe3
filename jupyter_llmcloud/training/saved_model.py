"""A model on its way to a folder: checked against the plain model, written, and loaded once to see that it can be."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_model
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training import architecture
from jupyter_llmcloud.training.parallel.strategies.alike import different

State = dict[str, torch.Tensor]


def write(name: str, model: Any, state: State, folder: Path) -> None:
    """Write a plain model with its gathered `state` to `folder`. Raises UsageError when that is not the model."""
    plain = _plain(model)
    if plain is not None:
        _check(name, state, plain)
        _tie(plain, state)
    if hasattr(model, "save_pretrained"):
        model.__dict__["should_save_on_this_rank"] = lambda _: True  # transformers lets only rank 0 write
        try:
            with no_progress_bars():
                model.save_pretrained(folder, state_dict=state)
        finally:
            del model.__dict__["should_save_on_this_rank"]
    else:
        gathered: Any = types.SimpleNamespace(state_dict=lambda: state)
        save_model(gathered, str(folder / "model.safetensors"))
    with loading(name, folder):
        _load(model, plain, state, folder)
    if architecture.is_own(model):
        architecture.write(model, folder)


@contextlib.contextmanager
def loading(name: str, folder: Path) -> Iterator[None]:
    """In the block what was saved is loaded. Raises UsageError when it cannot be; the block draws no random numbers."""
    try:
        with no_progress_bars(), torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:
        raise UsageError(
            f"--save {name}: what was written could not be loaded again, so nothing is kept of it "
            f"({type(error).__name__}: {error}). The variable is still on the ranks: save it in a cell of your own, "
            "into run.folder."
        ) from error


def _plain(model: Any) -> PreTrainedModel | None:
    """The model that its configuration describes, without memory; None when that cannot be told.

    Adapters and quantised weights are in no configuration, and a class may want more than one to be made.
    """
    changed = getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None) is not None
    if not isinstance(model, PreTrainedModel) or changed:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception:
        return None


def _check(name: str, state: State, plain: PreTrainedModel) -> None:
    wanted = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    kind = type(plain).__name__
    if difference := different(found, wanted, "the model", f"a {kind} of its configuration"):
        raise UsageError(
            f"--save {name}: it is not the {kind} that its configuration describes, and could not be loaded as one: "
            f"{difference}. Change model.config along with the model, give your class what you have added, or save "
            "it in a cell of your own, into run.folder."
        )


def _tie(plain: PreTrainedModel, state: State) -> None:
    """Tensors that are one in the plain model are one in its state: a gathering copies each of them.

    Where a cell has parted them, both are kept: transformers reads both, and does not tie them.
    """
    for name, source in getattr(plain, "all_tied_weights_keys", {}).items():
        if name in state and source in state and _is_equal(state[name], state[source]):
            state[name] = state[source]


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _load(model: Any, plain: PreTrainedModel | None, state: State, folder: Path) -> None:
    if plain is not None:
        _, report = type(model).from_pretrained(
            folder, device_map="meta", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        wrong = [f"{kind.replace('_', ' ')}: {', '.join(map(str, keys))}" for kind, keys in report.items() if keys]
        if wrong:
            raise ValueError("; ".join(wrong))
    elif not hasattr(model, "save_pretrained"):
        _compare(state, folder / "model.safetensors")


def _compare(state: State, path: Path) -> None:
    """Of tensors that share their memory the file holds one."""
    with safe_open(path, "pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    memory = {state[key].untyped_storage().data_ptr() for key in saved}
    wanted = {
        key: tuple(value.shape)
        for key, value in state.items()
        if key in saved or value.untyped_storage().data_ptr() not in memory
    }
    if difference := different(wanted, saved, "the model", "the file"):
        raise ValueError(difference)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within the block transformers draws none: one for a file's shards would be taken for the run's own progress."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
