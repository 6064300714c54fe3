"""How a folder's vectors are made of hidden states, as sentence-transformers writes it down.

The files: modules.json lists the steps, 1_Pooling/config.json the pooling
(https://sbert.net/docs/package_reference/sentence_transformer/models.html).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from jupyter_llmcloud.errors import ModelError

Pooling = Literal["mean", "cls", "last"]
_CONFIG = Path("1_Pooling", "config.json")
# A mean that is scaled by the text's length is the same one, once a vector's length is 1.
_MODES: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "mean_sqrt_len_tokens": "mean", "lasttoken": "last"}
_FLAGS: dict[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_STEPS = ("Transformer", "Pooling", "Normalize")


def pooling_of(folder: Path) -> Pooling:
    """The pooling that a folder states; mean, which is the default of sentence-transformers, for any other.

    Raises ModelError where its vectors are made in a way that is not known here: they would be others.
    """
    steps = _read(folder / "modules.json") or []
    named = [str(step.get("type", "")).rpartition(".")[2] for step in steps if isinstance(step, dict)]
    if unknown := [name for name in named if name not in _STEPS]:
        raise ModelError(
            f"{folder}: modules.json has the step {unknown[0]!r}, which is not done here, so its vectors would be "
            "wrong. Serve a model of transformer, pooling and normalisation; any other one by %%serve."
        )
    config = _read(folder / _CONFIG) or {}
    told = config.get("pooling_mode")
    modes = [told] if isinstance(told, str) else [mode for flag, mode in _FLAGS.items() if config.get(flag)]
    if not modes:
        return "mean"
    if len(modes) > 1 or modes[0] not in _MODES:
        raise ModelError(
            f"{folder}: {_CONFIG} asks for {' and '.join(modes)} pooling, which is not done here. "
            f"Known are {', '.join(_MODES)}, one of them; serve any other model by %%serve."
        )
    return _MODES[modes[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}.") from None
