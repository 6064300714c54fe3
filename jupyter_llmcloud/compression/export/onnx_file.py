"""ONNX: one graph from token ids to scores, without a cache, for any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.compression.export.parity import check_installed, compare
from jupyter_llmcloud.compression.sources import SourceModel
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

_LARGEST = 1_900_000_000  # bytes in one file of the format
_EXAMPLE = (2, 7)  # texts, tokens: neither is 0 or 1, which are taken for constants


class _Scores(torch.nn.Module):
    """Token ids [texts, tokens] to scores [texts, tokens, vocabulary]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As the graph has it."""
        scores: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return scores


def write_onnx(
    loaded: LoadedModel, source: SourceModel, out: Path, weights: str, tell: Callable[[str], None]
) -> list[str]:
    """Write the file; returns notes. Raises UsageError without its packages, ModelError when it cannot be done."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        check_installed(package, "onnx")
    if loaded.is_encoder_decoder:
        raise ModelError("--to onnx is for models that go on with a text: an encoder-decoder is not exported.")
    num_bytes = sum(weight.numel() * weight.element_size() for weight in loaded.model.parameters())
    if num_bytes > _LARGEST:
        raise ModelError(f"{num_bytes / 1e9:.1f} GB of weights are more than one ONNX file holds (2 GB).")
    tell(f"{source.name} is traced")
    example = torch.arange(_EXAMPLE[0] * _EXAMPLE[1]).view(_EXAMPLE) % loaded.num_vocabulary
    shapes = {"input_ids": {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}}
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                _Scores(loaded.model),
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["input_ids"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # code of many packages
        raise ModelError(f"torch.onnx cannot export this model: {type(error).__name__}: {str(error)[:500]}") from error
    assert program is not None
    program.save(out, include_initializers=True)
    tell(f"{source.name} is compared in ONNX Runtime")
    return compare(loaded, _runtime(out), "ONNX Runtime")


def _runtime(file: Path) -> Callable[[Sequence[int]], Any]:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(["logits"], {"input_ids": np.array([tokens], dtype=np.int64)})[0][0]
