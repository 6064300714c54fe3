"""A model as a file for another runtime, and whether that computes what the model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jupyter_llmcloud.compression.sources import SourceModel, find_source
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.inference.engines.loading import load_model
from jupyter_llmcloud.inference.engines.quantized.loading import scheme_of
from jupyter_llmcloud.protocol.compression import Event, Exported, ExportRequest
from jupyter_llmcloud.protocol.model_work import WorkProgress
from jupyter_llmcloud.storage.runs import RunStore

Tell = Callable[[Event], None]
SUFFIXES = {"onnx": ".onnx", "gguf": ".gguf", "executorch": ".pte"}
FOLDER = "export"  # of a run
_PLAIN = "its quantized weights are written as the numbers that they stand for, as large as before"


def export(request: ExportRequest, tell: Tell) -> None:
    """Write the file, and compare. What was written is removed again when it is not what the model computes."""
    if request.to == "onnx":
        from jupyter_llmcloud.compression.export.onnx_file import write_onnx as write
    elif request.to == "gguf":
        from jupyter_llmcloud.compression.export.gguf_file import write_gguf as write
    else:
        from jupyter_llmcloud.compression.export.executorch_file import write_executorch as write
    source = find_source(request.target, request.base_model)
    out = Path(request.out) if request.out else _default(source, request.to)
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: expected a file in a folder that is there.")
    tell(WorkProgress(text=f"{source.name} is read"))
    loaded = load_model(
        source.folder, dtype="float32", base_model=source.layout.folder if source.layout.adapter else None
    )
    staging = out.with_name(f".{out.name}.staging")
    try:
        notes = write(loaded, source, staging, request.weights, lambda text: tell(WorkProgress(text=text)))
        staging.replace(out)
    finally:
        staging.unlink(missing_ok=True)
    plain = [_PLAIN] if _is_quantized(source.folder) else []
    tell(Exported(path=str(out), notes=[f"{out.stat().st_size / 1e6:.2f} MB", *plain, *notes]))


def _is_quantized(folder: Path) -> bool:
    return (folder / "config.json").is_file() and scheme_of(folder) is not None


def _default(source: SourceModel, to: str) -> Path:
    """In the folder of the run, else beside the folder of the model."""
    name = f"{source.name}{SUFFIXES[to]}"
    if not source.run_id:
        return source.folder.with_name(name)
    folder = RunStore().folder(source.run_id).path / FOLDER
    folder.mkdir(exist_ok=True)
    return folder / name
