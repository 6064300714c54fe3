"""Whether a model's weights are floating numbers still."""

from __future__ import annotations

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.quantized.linear import QuantizedLinear


def check_plain(loaded: LoadedModel) -> None:
    """Raise ModelError for a model that is quantized."""
    if any(isinstance(module, QuantizedLinear) for module in loaded.model.modules()):
        raise ModelError(
            "this model is quantized already: name the one that it was made of. One that is to be pruned, distilled or "
            "merged and quantized is quantized last."
        )
