"""Which server of others stands behind a replica, if any, and how it comes up."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.serving.models.engine_names import AUTO, STARTED, VLLM, is_url
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.external.commands import EngineOptions, is_installed
from jupyter_llmcloud.inference.external.server import ExternalServer, elsewhere, started

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExternalSpec:
    """What is to be served, and how.

    Attributes:
        model: a folder or a GGUF file; for a URL the model's name there.
        key_variable: for a URL, the environment variable that holds its key.
    """

    engine: str
    model: str
    name: str
    dtype: str = "auto"
    device: str = "cpu"
    max_concurrent: int = 32
    max_model_len: int | None = None
    num_threads: int = 1
    key_variable: str = ""


async def open_external(spec: ExternalSpec) -> ExternalServer | None:
    """The server that answers in place of an engine of ours; None: there is none. Raises ModelError.

    "auto" takes vLLM for a GPU where that is installed; one that does not come up leaves the model to our own engines.
    """
    if is_url(spec.engine):
        return await elsewhere(spec.engine, spec.model, spec.key_variable)
    if spec.engine in STARTED:
        return await _started(spec, spec.engine)
    if spec.engine == AUTO and spec.device.startswith("cuda") and is_installed(VLLM):
        try:
            return await _started(spec, VLLM)
        except ModelError as error:
            log.warning("not served by vLLM: %s", error)
    return None


async def _started(spec: ExternalSpec, engine: str) -> ExternalServer:
    def options(port: int, key: str) -> EngineOptions:
        return EngineOptions(
            spec.model, spec.name, port, key, spec.dtype, spec.max_concurrent, spec.max_model_len, spec.num_threads,
            spec.device,
        )  # fmt: skip

    return await started(engine, options)


async def details(server: ExternalServer, spec: ExternalSpec) -> dict[str, Any]:
    """What /readyz tells of it."""
    told = (await server.models()).get(server.model, {})
    meta = told.get("meta") if isinstance(told.get("meta"), dict) else {}
    known = (spec.max_model_len, told.get("max_model_len"), meta.get("n_ctx_train") if meta else None)
    length = next((value for value in known if isinstance(value, int) and value > 0), None)
    return {
        "engine": server.engine,
        **({"context_length": length} if length is not None else {}),
        "num_threads": spec.num_threads,
        "device": spec.device,
    }
