"""What a replica serves by the Open Inference Protocol, loaded on the thread that will compute it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.serving.models.model_kind import says
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.open_inference.predictor import Predictor
from jupyter_llmcloud.inference.open_inference.routes import ServedPredictor
from jupyter_llmcloud.storage.model_folder import ARCHITECTURE, ModelLayout
from jupyter_llmcloud.storage.models import served_code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictorSpec:
    """What to load, and how.

    Attributes:
        layout: a model; None: `source` is all there is.
        source: a file with code of the user's own: a cell or an object.
        max_rows: of a batch.
    """

    name: str
    kind: str
    layout: ModelLayout | None
    source: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    max_rows: int = 32
    num_threads: int = 1


async def open_predictor(spec: PredictorSpec) -> ServedPredictor:
    """Load it; raises ModelError."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
    try:
        predictor = await asyncio.get_running_loop().run_in_executor(thread, _load, spec)
    except BaseException:
        thread.shutdown(wait=False)
        raise
    return ServedPredictor(predictor, spec.name, spec.max_rows, thread)


def _load(spec: PredictorSpec) -> Predictor:
    if spec.layout is None:
        return _of_code(spec)
    import torch

    torch.set_num_threads(spec.num_threads)
    if spec.layout.architecture is not None:
        from jupyter_llmcloud.inference.architecture import load_own
        from jupyter_llmcloud.inference.open_inference.modules import ModulePredictor

        module = load_own(spec.layout.architecture, spec.layout.folder, spec.dtype, spec.device)
        return ModulePredictor(module, spec.max_rows)
    from jupyter_llmcloud.inference.open_inference.classifiers.loading import TRANSFORMERS_KINDS, load_predictor

    if spec.kind not in TRANSFORMERS_KINDS:
        raise ModelError(
            f"{spec.layout.folder} {says(spec.kind)}. Served are text generators, encoders, sequence, token and image "
            "classifiers, regressors, and any model by %%serve."
        )
    return load_predictor(spec.layout, spec.kind, dtype=spec.dtype, device=spec.device, max_rows=spec.max_rows)


def _of_code(spec: PredictorSpec) -> Predictor:
    path = Path(spec.source)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what the code prints is read in the log
    if path.name == served_code.CELL:
        source = served_code.read_cell(path)
        work_in(source.folder)
        from jupyter_llmcloud.inference.open_inference.python_model import of_cell

        return of_cell(source)
    if path.name == served_code.OBJECT:
        work_in(str(served_code.object_record(path)["folder"]))
        return _of_object(path, spec)
    raise ModelError(f"{path} is no code that was given to be served.")


def _of_object(path: Path, spec: PredictorSpec) -> Predictor:
    from jupyter_llmcloud.inference.open_inference.python_model import PythonModel, of_object
    from jupyter_llmcloud.inference.own_models.objects import module_of, unpickled

    value = module_of(unpickled(path))
    if _is_module(value):
        import torch

        from jupyter_llmcloud.inference.open_inference.modules import ModulePredictor

        torch.set_num_threads(spec.num_threads)
        return ModulePredictor(value.to(spec.device), spec.max_rows)
    try:
        return PythonModel(of_object(value, spec.max_rows))
    except TypeError as error:
        raise ModelError(f"{error}.") from None


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def work_in(folder: str) -> None:
    """Go where the notebook is, as far as that is on this host: for its files and its own modules."""
    if folder and os.path.isdir(folder):
        os.chdir(folder)
        sys.path.insert(0, folder)


def is_code(source: str) -> bool:
    """Whether a replica with this source runs code alone, and has no model folder."""
    return bool(source) and Path(source).name != ARCHITECTURE
