"""What leaves a rank: a model in the Hugging Face layout, and variables that are pulled."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from jupyter_llmcloud import config
from jupyter_llmcloud.core.names import type_in_words
from jupyter_llmcloud.protocol.payload_size import dump_variables
from jupyter_llmcloud.system.atomic_files import publish_folder
from jupyter_llmcloud.training import saved_model
from jupyter_llmcloud.training.parallel import plans
from jupyter_llmcloud.training.parallel.agreement import (
    SavedModel,
    agree,
    describe,
    gathered,
    group_of,
    unlike_values,
)
from jupyter_llmcloud.training.parallel.unwrap import inner, is_fabric, plain_reduction, unwrapped


def save(names: list[str], namespace: dict[str, Any], folder: Path, ranks: list[int], rank: int) -> dict[str, str]:
    """Write variables to `folder`, staged first, then renamed; only the first of the `ranks` touches the disk.

    A model is saved as the plain one, without its wrappers: a `PreTrainedModel`, tokenizer or processor by its own
    `save_pretrained` (safetensors); a `tokenizers.Tokenizer` as a fast tokenizer; any other `nn.Module` as
    `model.safetensors`. All `ranks` must call it: they agree on what they hold before it is gathered. Raises UsageError
    when a rank cannot save, when ranks hold different models, or when what was written could not be loaded again.
    Returns what was written, on the rank that has.
    """
    if not names:
        return {}
    namespace = {name: inner(value) if is_fabric(value) else value for name, value in namespace.items()}
    with group_of(ranks) as group:
        described = gathered({name: _describe(name, namespace, ranks, rank) for name in names}, ranks, group)
    agree(described)
    if rank == ranks[0]:
        _tell_of_unlike_values(unlike_values(described), rank)
    staging = folder.with_name(f".{folder.name}.staging")
    if rank == ranks[0]:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    try:
        for name, place in _places(names, namespace).items():
            _save_one(name, namespace[name], staging / place, rank == ranks[0])
    except BaseException:
        if rank == ranks[0]:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    if rank != ranks[0]:
        return {}  # whether it is written in the end is not known here
    publish_folder(staging, folder, durable=False)  # the cell does not wait for gigabytes to be on the disk
    return {"model": folder.name}


def _describe(name: str, namespace: dict[str, Any], ranks: list[int], rank: int) -> SavedModel:
    if name not in namespace:
        return SavedModel(f"--save {name}: the cell left no variable {name!r} on rank {rank}")
    value = namespace[name]
    can_be_saved = isinstance(value, torch.nn.Module) or hasattr(value, "save_pretrained") or _is_raw_tokenizer(value)
    if not can_be_saved:
        return SavedModel(
            f"--save {name}: cannot save {type_in_words(value)}. Name a model (torch.nn.Module), a tokenizer, "
            "or anything with save_pretrained()."
        )
    return describe(name, value, compares_values=len(ranks) > 1)


def _places(names: list[str], namespace: dict[str, Any]) -> dict[str, str]:
    """In which folder below the model's each is kept: a second model, or tokenizer, would write over the first one."""
    found: dict[str, str] = {}
    kinds: set[str] = set()
    for name in names:
        value = namespace[name]
        is_tokenizer = _is_raw_tokenizer(value) or isinstance(value, PreTrainedTokenizerBase)
        kind = "model" if isinstance(value, torch.nn.Module) else "tokenizer" if is_tokenizer else type(value).__name__
        found[name] = name if kind in kinds else ""
        kinds.add(kind)
    return found


def _is_raw_tokenizer(value: Any) -> bool:
    return type(value).__module__.startswith("tokenizers")


def _tell_of_unlike_values(unlike: dict[str, str], rank: int) -> None:
    for name, parameter in unlike.items():
        print(
            f"--save {name}: the ranks hold different values, {parameter} among them; those of rank {rank} are saved. "
            "Ranks train one model when it is prepared: model = accelerator.prepare(model)",
            file=sys.stderr,
        )


def _save_one(name: str, value: Any, folder: Path, writes: bool) -> None:
    if writes and not folder.exists():
        folder.mkdir()
        print(f"--save: a run has one model, the first; {name} is kept in model/{folder.name}.", file=sys.stderr)
    if isinstance(value, torch.nn.Module):
        state = plans.layout_of(value).full_state(value)
        if writes:
            saved_model.write(name, unwrapped(value), state, folder)
    elif writes:
        if _is_raw_tokenizer(value):
            from transformers import PreTrainedTokenizerFast

            value = PreTrainedTokenizerFast(tokenizer_object=value)
        value.save_pretrained(folder)
        if callable(load := getattr(type(value), "from_pretrained", None)):
            with saved_model.loading(name, folder):
                load(folder, local_files_only=True)


def pickled(values: dict[str, Any], what: str = "%pull") -> bytes:
    """Variables that leave their rank: plain models, tensors on the CPU, wherever they are inside.

    Raises TypeError naming the one that cannot be pickled, UsageError naming those that are too large; `what` asked.
    """
    return dump_variables(values, _dump, what, str(config.root()), _cannot_leave)


def _cannot_leave(name: str, value: Any, error: Exception) -> TypeError:
    return TypeError(f"{name!r} ({type(value).__name__}) cannot be pickled: {error}. Bring plain values of it.")


def _dump(value: Any, file: Any) -> None:
    _PicklerForElsewhere(file).dump(value)


class _PicklerForElsewhere(cloudpickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Module) and (reduced := plain_reduction(value)) is not None:
            return reduced
        if isinstance(value, DTensor):
            raise TypeError(
                "it is spread over the ranks (DTensor). Gather it in a cell, as in x = x.full_tensor(), and pull that. "
                "A model is gathered by --save"
            )
        if isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta"):
            copy = value.detach().cpu()
            if isinstance(value, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, requires_grad=value.requires_grad)
            return copy.__reduce_ex__(4)
        return super().reducer_override(value)
