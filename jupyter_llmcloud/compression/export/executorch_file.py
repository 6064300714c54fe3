"""ExecuTorch: a program for phones and embedded computers, with the kernels of XNNPACK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.compression.export.onnx_file import _Scores
from jupyter_llmcloud.compression.export.parity import compare
from jupyter_llmcloud.compression.sources import SourceModel
from jupyter_llmcloud.errors import ModelError, UsageError
from jupyter_llmcloud.inference.engines.loading import LoadedModel


def write_executorch(
    loaded: LoadedModel, source: SourceModel, out: Path, weights: str, tell: Callable[[str], None]
) -> list[str]:
    """Write the file; returns notes. Raises UsageError without its package, ModelError when it cannot be done."""
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime
    except ImportError as error:
        raise UsageError(
            f"--to executorch needs the package executorch, made for the torch that is installed "
            f"({torch.__version__}): pip install executorch. ({error})"
        ) from None
    length = loaded.context_length
    example = torch.arange(min(7, length)).view(1, -1)
    tokens = torch.export.Dim("tokens", min=2, max=length - 1)
    try:
        with torch.no_grad():
            traced = torch.export.export(_Scores(loaded.model), (example,), dynamic_shapes={"input_ids": {1: tokens}})
            lowered = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # code of many packages
        raise ModelError(f"ExecuTorch cannot take this model: {type(error).__name__}: {str(error)[:500]}") from error
    out.write_bytes(lowered.buffer)
    tell(f"{source.name} is compared in ExecuTorch")
    method = Runtime.get().load_program(out).load_method("forward")

    def scores(ids: Sequence[int]) -> Any:
        return method.execute([torch.tensor([list(ids)])])[0][0]

    return compare(loaded, scores, "ExecuTorch")
