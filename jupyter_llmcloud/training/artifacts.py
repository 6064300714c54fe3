"""What leaves a rank: a model in the Hugging Face layout, and variables that are pulled."""

from __future__ import annotations

import contextlib
import operator
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save_model
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as hf_logging

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.payload_size import MAX_VARIABLES, CountingFile, TooLarge, dump_within


def unwrapped(value: Any) -> Any:
    """A model without its parallel or compiled wrapper; anything else as it is."""
    if isinstance(value, torch.nn.Module):
        return extract_model_from_parallel(value, keep_torch_compile=False)
    return value


def save(variables: dict[str, Any], folder: Path, writes: bool) -> dict[str, str]:
    """Write variables to `folder`, aside first, then renamed; only the rank that `writes` touches the disk.

    A `PreTrainedModel`, tokenizer or processor is saved by its own `save_pretrained` (safetensors); a
    `tokenizers.Tokenizer` as a fast tokenizer; any other `nn.Module` as `model.safetensors`. Raises TypeError
    otherwise. Every rank must call it: a sharded model is gathered by all.
    """
    if not variables:
        return {}
    aside = folder.with_name(folder.name + ".aside")
    if writes:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    for name, value in variables.items():
        _save_one(name, unwrapped(value), aside, writes)
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    return {"model": folder.name}


def _save_one(name: str, value: Any, folder: Path, writes: bool) -> None:
    if isinstance(value, torch.nn.Module):
        _save_model(value, folder, writes)
    elif hasattr(value, "save_pretrained"):
        if writes:
            value.save_pretrained(folder)
    elif type(value).__module__.startswith("tokenizers"):
        from transformers import PreTrainedTokenizerFast

        if writes:
            PreTrainedTokenizerFast(tokenizer_object=value).save_pretrained(folder)
    else:
        raise TypeError(
            f"--save {name}: cannot save a {type(value).__name__}. Name a model (torch.nn.Module), a tokenizer, "
            "or anything with save_pretrained()."
        )


def _save_model(model: Any, folder: Path, writes: bool) -> None:
    state = {name: _gathered(tensor) for name, tensor in model.state_dict().items()}
    if not writes:
        return
    if hasattr(model, "save_pretrained"):
        model.__dict__["should_save_on_this_rank"] = lambda _: True  # transformers lets only rank 0 write
        try:
            with _no_progress_bars():
                model.save_pretrained(folder, state_dict=state)
        finally:
            del model.__dict__["should_save_on_this_rank"]
    else:
        gathered: Any = types.SimpleNamespace(state_dict=lambda: state)
        save_model(gathered, str(folder / "model.safetensors"))


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    # A bar for writing the shards would be taken for the run's own progress.
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _gathered(tensor: Any) -> Any:
    full = getattr(tensor, "full_tensor", None)
    return full().clone() if callable(full) else tensor  # without the padding of the shards


def pickled(values: dict[str, Any], what: str = "%pull") -> bytes:
    """Variables that leave their rank: models without their group, tensors on the CPU, wherever they are inside.

    Raises TypeError naming the one that cannot be pickled, UsageError naming those that are too large; `what` asked.
    """
    try:
        return dump_within(values, _dump, MAX_VARIABLES, what, str(config.root()))
    except TooLarge as error:
        raise UsageError(str(error)) from None
    except Exception:
        for name, value in values.items():
            try:
                _dump(value, CountingFile())
            except Exception as error:
                raise TypeError(f"{name!r} ({type(value).__name__}) cannot be pickled: {error}") from None
        raise


def _dump(value: Any, file: Any) -> None:
    _PicklerForElsewhere(file).dump(value)


class _PicklerForElsewhere(cloudpickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, DistributedDataParallel):
            return operator.itemgetter(0), ((value.module,),)
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
