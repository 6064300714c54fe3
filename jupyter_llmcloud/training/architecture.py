"""The architecture of a model that no library has, kept beside its weights: the module by value, without its tensors.

Classes and functions of cells go along with what they use, as cloudpickle takes them. Only what a run saved itself is
ever read back (by the endpoint that serves the run), since a pickle can run code.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch.distributed.tensor import DTensor

from jupyter_llmcloud.storage.model_folder import ARCHITECTURE, ARCHITECTURE_RECORD, ARCHITECTURE_SOURCE
from jupyter_llmcloud.system.atomic_files import write_json
from jupyter_llmcloud.training.parallel.unwrap import plain_class, plain_reduction

MAX_BYTES = 64 << 20


def is_own(model: torch.nn.Module) -> bool:
    """Whether its class is needed to load it: any that transformers does not find by the name in config.json."""
    return not (plain_class(model).__module__.startswith("transformers.") and hasattr(model, "save_pretrained"))


def write(model: torch.nn.Module, folder: Path) -> None:
    """Keep the architecture of a plain model. One that cannot be kept is no error: the record says why."""
    record = {"class": plain_class(model).__qualname__, "kind": _kind(model), "problem": ""}
    try:
        (folder / ARCHITECTURE).write_bytes(_pickled(model))
    except Exception as error:
        record["problem"] = f"{type(error).__name__}: {error}"
    if source := _source(model):
        (folder / ARCHITECTURE_SOURCE).write_text(source, encoding="utf-8")
    write_json(folder / ARCHITECTURE_RECORD, record, durable=False)


def _kind(model: torch.nn.Module) -> str:
    can_generate = getattr(type(model), "can_generate", None)
    try:
        generates = hasattr(model, "save_pretrained") and callable(can_generate) and bool(can_generate())
    except Exception:
        generates = False
    return "generator" if generates else "module"


def _pickled(model: torch.nn.Module) -> bytes:
    file = io.BytesIO()
    _ArchitecturePickler(model, file).dump(model)
    if file.tell() > MAX_BYTES:
        raise ValueError(
            f"without its weights it has {file.tell()} bytes, at most {MAX_BYTES} are kept. Does a method of its class "
            "use a large variable of the notebook?"
        )
    return file.getvalue()


def _blanks() -> Callable[..., Any]:
    """Makes a tensor of zeros. A function inside a function, so that it is pickled by value and needs no import."""

    def blank(shape: tuple[int, ...], dtype: Any, requires_grad: bool | None) -> Any:
        import torch

        zeros = torch.zeros(shape, dtype=dtype)
        return zeros if requires_grad is None else torch.nn.Parameter(zeros, requires_grad=requires_grad)

    return blank


class _ArchitecturePickler(cloudpickle.Pickler):
    """What is in the state of the model is told by its shape; any other tensor (a buffer that is not saved) whole."""

    def __init__(self, model: torch.nn.Module, file: Any) -> None:
        super().__init__(file)
        self._saved = {id(value) for value in _saved_tensors(model)}
        self._blank = _blanks()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Module) and (reduced := plain_reduction(value)) is not None:
            return reduced
        if isinstance(value, torch.Tensor):
            if id(value) in self._saved:
                grad = value.requires_grad if isinstance(value, torch.nn.Parameter) else None
                return self._blank, (tuple(value.shape), value.dtype, grad)
            if isinstance(value, DTensor):
                raise TypeError("a part of it is spread over the ranks and is not saved with its weights")
            if value.device.type not in ("cpu", "meta"):
                return value.detach().cpu().__reduce_ex__(4)
        return super().reducer_override(value)


def _saved_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What a state dict holds. It is not asked for one: a part that is spread over the ranks would gather itself."""
    for part in model.modules():
        yield from part.parameters(recurse=False)
        yield from (
            value
            for name, value in part._buffers.items()
            if value is not None and name not in part._non_persistent_buffers_set
        )


def _source(model: torch.nn.Module) -> str:
    """The source of its classes that cells have defined, for people."""
    kinds = {plain_class(part): None for part in model.modules()}
    own = {base: None for kind in kinds for base in reversed(kind.__mro__) if base.__module__ == "__main__"}
    texts = []
    for kind in own:
        try:
            texts.append(inspect.getsource(kind))
        except (OSError, TypeError):
            continue
    return "\n\n".join(texts)
