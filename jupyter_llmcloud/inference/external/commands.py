"""How vLLM and llama.cpp are started: their command lines and environments, decided before anything runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jupyter_llmcloud.core.serving.models.engine_names import LLAMA_CPP, VLLM
from jupyter_llmcloud.errors import ModelError

MAX_SLOTS = 8  # of llama.cpp, each of which takes its share of the context


@dataclass(frozen=True)
class EngineOptions:
    """What the engine is told.

    Attributes:
        model: a folder, or for llama.cpp a GGUF file.
        name: the model's name in requests.
        port: on 127.0.0.1.
        key: that requests must carry.
    """

    model: str
    name: str
    port: int
    key: str
    dtype: str = "auto"
    max_concurrent: int = 32
    max_model_len: int | None = None
    num_threads: int = 1
    device: str = "cpu"

    @property
    def devices(self) -> list[int]:
        """The GPUs by their numbers; several for "cuda:0,1"."""
        return [int(number) for number in self.device.partition(":")[2].split(",") if number]


@dataclass(frozen=True)
class Command:
    """A process to start."""

    arguments: list[str]
    env: dict[str, str] = field(default_factory=dict)


Which = Callable[[str], str | None]


def command_of(engine: str, options: EngineOptions, which: Which = shutil.which) -> Command:
    """The command that starts an engine. Raises ModelError when it is not installed."""
    made = _vllm(options, which) if engine == VLLM else _llama_cpp(options, which)
    if made is None:
        how = {
            VLLM: "pip install vllm",
            LLAMA_CPP: "pip install 'llama-cpp-python[server]', or put llama-server on the PATH",
        }
        raise ModelError(f"--engine {engine}: it is not installed where models are served: {how[engine]}.")
    env = {"OMP_NUM_THREADS": str(options.num_threads), **made.env}
    if options.device.startswith("cuda:"):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(options.devices))
    return Command(made.arguments, env)


def _visible(devices: Sequence[int]) -> list[str]:
    """GPUs by the names that a process of its own knows them by: this one may see some of the host's only."""
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [seen[index] if index < len(seen) else str(index) for index in devices]


def is_installed(engine: str, which: Which = shutil.which) -> bool:
    """Whether the engine can be started here."""
    try:
        command_of(engine, EngineOptions("", "", 0, ""), which)
    except ModelError:
        return False
    return True


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _vllm(options: EngineOptions, which: Which) -> Command | None:
    if (found := which("vllm")) is not None:
        start = [found, "serve", options.model]
    elif _importable("vllm"):
        start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    else:
        return None
    arguments = [
        *start, "--host", "127.0.0.1", "--port", str(options.port), "--served-model-name", options.name,
        "--dtype", options.dtype, "--max-num-seqs", str(options.max_concurrent),
    ]  # fmt: skip
    if options.max_model_len is not None:
        arguments += ["--max-model-len", str(options.max_model_len)]
    if len(options.devices) > 1:
        arguments += ["--tensor-parallel-size", str(len(options.devices))]
    return Command(arguments, {"VLLM_API_KEY": options.key, "VLLM_NO_USAGE_STATS": "1"})


def _llama_cpp(options: EngineOptions, which: Which) -> Command | None:
    context = options.max_model_len or 0  # 0: as many as the model was made for
    threads = str(options.num_threads)
    where = ["--host", "127.0.0.1", "--port", str(options.port)]
    if (found := which("llama-server")) is not None:
        slots = min(options.max_concurrent, MAX_SLOTS)
        arguments = [
            found, "-m", options.model, *where, "--alias", options.name, "-np", str(slots),
            "-c", str(context * slots), "-t", threads,
        ]  # fmt: skip
        return Command(arguments, {"LLAMA_API_KEY": options.key})
    if not (_importable("llama_cpp") and _importable("starlette_context")):
        return None
    arguments = [
        sys.executable, "-m", "llama_cpp.server", "--model", options.model, *where, "--model_alias", options.name,
        "--n_ctx", str(context), "--n_threads", threads,
        "--interrupt_requests", "false",  # by default a new request ends the stream of another
    ]  # fmt: skip
    return Command(arguments, {"API_KEY": options.key})
