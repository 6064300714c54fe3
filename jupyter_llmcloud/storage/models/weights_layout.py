"""Whether two model folders differ in nothing but the values of their weights: then one can be loaded into the other.

Only headers and small files are read. The types of the weights may differ: they are converted when they are loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_NO_MATTER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def difference(one: Path, other: Path) -> str:
    """In what two folders differ besides the values of weights; "" when in nothing.

    Raises OSError or ValueError when one of them cannot be read.
    """
    if _config(one) != _config(other):
        return "the configuration (config.json) is another one"
    for name in _FILES:
        if _text(one / name) != _text(other / name):
            return f"{name} is another one"
    before, after = _shapes(one), _shapes(other)
    if unlike := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        name = unlike[0]
        return f"{name} has the shape {after.get(name, 'none')}, not {before.get(name, 'none')}"
    return ""


def _config(folder: Path) -> dict[str, Any]:
    read = json.loads((folder / "config.json").read_bytes())
    return {name: value for name, value in read.items() if name not in _NO_MATTER}


def _text(file: Path) -> Any:
    if not file.is_file():
        return None
    data = file.read_bytes()
    if file.suffix != ".json":
        return data
    read = json.loads(data)
    # How a batch was cut and filled while it was trained stays in a tokenizer, and says nothing of its tokens.
    passing = ("truncation", "padding", *_NO_MATTER)
    return {name: value for name, value in read.items() if name not in passing} if isinstance(read, dict) else read


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes.update({name: row["shape"] for name, row in header.items() if name != "__metadata__"})
    return shapes
