"""Smaller models of one. Each method works by itself: one that cannot be had keeps no other from being made."""

from __future__ import annotations

import gc
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from jupyter_llmcloud.compression.methods.distillation import check_teacher
from jupyter_llmcloud.compression.methods.merging import merge
from jupyter_llmcloud.compression.methods.precision import to_bfloat16
from jupyter_llmcloud.compression.methods.pruning import prune
from jupyter_llmcloud.compression.methods.quantization import write_quantized
from jupyter_llmcloud.compression.results import keep
from jupyter_llmcloud.compression.sources import SourceModel, find_source
from jupyter_llmcloud.compression.texts import read_texts, written_by
from jupyter_llmcloud.core.compression.methods import CompressionMethod
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.protocol.compression import CompressRequest, Event, MethodRefused, Trainable
from jupyter_llmcloud.protocol.model_work import WorkProgress

log = logging.getLogger(__name__)

Tell = Callable[[Event], None]


def make(request: CompressRequest, tell: Tell) -> None:
    """Make what is asked for, one after the other; those of a distillation are checked, and trained elsewhere."""
    tell(WorkProgress(text=f"{request.target} is read"))
    source = find_source(request.target, request.base_model)
    for method in map(CompressionMethod.parse, request.methods):
        tell(WorkProgress(text=f"{method.text} of {source.name}"))
        try:
            tell(_trainable(source, method, request) if method.trains else _made(source, method, request, tell))
        except LLMCloudError as error:
            tell(MethodRefused(method=method.text, reason=str(error)))
        except Exception as error:  # much code of others: the other methods are made nevertheless
            log.exception("%s failed", method.text)
            tell(MethodRefused(method=method.text, reason=f"{type(error).__name__}: {error}"))
        gc.collect()


def _made(source: SourceModel, method: CompressionMethod, request: CompressRequest, tell: Tell) -> Event:
    loaded = _load(source)

    def write(folder: Path) -> str:
        if method.kind == "lora-merge":
            return merge(loaded, source.layout, folder)
        if method.kind == "bf16":
            return to_bfloat16(loaded, folder)
        if method.kind == "prune":
            return prune(loaded, method.ratio, _texts(request, loaded), folder)
        return write_quantized(loaded, int(method.kind.removeprefix("int")), folder)

    made = keep(source, method, request, write)
    tell(WorkProgress(text=f"{made.name} is there"))
    return made


def _load(source: SourceModel) -> LoadedModel:
    return load_model(source.folder, base_model=source.layout.folder if source.layout.adapter else None)


def _texts(request: CompressRequest, loaded: LoadedModel) -> list[str]:
    return read_texts(request.texts) if request.texts else written_by(loaded)


def _trainable(source: SourceModel, method: CompressionMethod, request: CompressRequest) -> Event:
    """A distillation that can be begun; its texts are kept in a file for the ranks."""
    teacher = find_source(method.value)
    check_teacher(source, teacher)
    texts = request.texts
    if not texts:
        handle, texts = tempfile.mkstemp(prefix="llmcloud-texts-", suffix=".json")
        with open(handle, "w") as file:
            json.dump(written_by(_load(teacher)), file)
    return Trainable(
        method=method.text,
        name=request.name or method.name_of(source.name),
        student=str(source.folder),
        teacher=str(teacher.folder),
        texts=texts,
    )
