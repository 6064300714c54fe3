"""From what a caller has, to files that a process reads: texts, rows with labels, images, arrays."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.client.model_work.texts import JSON_LINES, named_file, texts_of_file
from jupyter_llmcloud.errors import UsageError

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_PIECE = 600  # characters that a long text is cut into, at ends of lines
_EXPECTED = "a list of texts, of rows with text and label, of pairs (text, label), or a pair of arrays (inputs, labels)"


def array_file(value: Any, folder: Path) -> str:
    """An image or an array, as a file in `folder`. Raises UsageError."""
    if isinstance(value, Path):
        return str(Path(os.path.expanduser(value)).absolute())
    if hasattr(value, "save") and hasattr(value, "convert"):  # an image of PIL
        path = folder / "input.png"
        value.convert("RGB").save(path)
        return str(path)
    import numpy as np

    path = folder / "input.npy"
    np.save(path, _array(value), allow_pickle=False)
    return str(path)


def _array(value: Any) -> Any:
    import numpy as np

    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"%explain: the input cannot be made an array: {error}.") from None
    if array.dtype.kind not in "fiub" or not array.size:
        raise UsageError(f"%explain: the input is a text, an image or an array of numbers, not {type(value).__name__}.")
    return array


def data_file(data: Any, folder: Path) -> tuple[str, str]:
    """The rows that a model is tried with, as a file in `folder`, and what they are. Raises UsageError."""
    if isinstance(data, str | Path):
        return _of_path(str(data), folder)
    told = "the data given"
    if isinstance(data, tuple) and len(data) == 2 and not _are_texts(data):
        return _arrays(data[0], data[1], folder), told
    if hasattr(data, "shape"):
        return _arrays(data, None, folder), told
    if not isinstance(data, Sequence) or not data:
        raise UsageError(f"--adversarial: the data are {_EXPECTED}, not {type(data).__name__}.")
    return _written([_row(row) for row in data], folder), told


def _are_texts(data: Sequence[Any]) -> bool:
    return all(isinstance(item, str | dict) for item in data)


def _row(row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return {"text": row["text"], "label": _plain(row.get("label"))}
    if isinstance(row, Sequence) and len(row) == 2 and isinstance(row[0], str):
        return {"text": row[0], "label": _plain(row[1])}
    raise UsageError(f"--adversarial: the data are {_EXPECTED}; there is a row {row!r:.80}.")


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _arrays(inputs: Any, labels: Any, folder: Path) -> str:
    import numpy as np

    kept = {"inputs": _array(inputs)}
    if labels is not None:
        kept["labels"] = np.asarray(labels.tolist() if hasattr(labels, "tolist") else labels)
        if kept["labels"].shape != (len(kept["inputs"]),):
            raise UsageError(
                f"--adversarial: there are {len(kept['inputs'])} inputs, "
                f"and labels of shape {list(kept['labels'].shape)}."
            )
    path = folder / "rows.npz"
    np.savez(path, **kept)
    return str(path)


def _of_path(given: str, folder: Path) -> tuple[str, str]:
    if os.path.isdir(os.path.expanduser(given)):
        path = Path(os.path.expanduser(given))
        return _written(_images(path), folder), path.name
    if (file := named_file(given)) is None:
        raise UsageError(f"--adversarial {given[:200]!r} is neither a file, a folder nor, in a notebook, a variable.")
    return _of_file(file, folder)


def _of_file(path: Path, folder: Path) -> tuple[str, str]:
    if path.suffix in JSON_LINES:
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise UsageError(f"--adversarial {path}: it is not a file of JSON lines: {error}.") from None
        return _written([_row(row) for row in rows], folder), path.name
    return _written([{"text": text} for text in _in_pieces(texts_of_file(path)[0])], folder), path.name


def _images(path: Path) -> list[dict[str, Any]]:
    """The images of a folder: those in a folder of its have that one's name as their label."""
    found: list[dict[str, Any]] = []
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in _IMAGES and file.is_file():
            label = None if file.parent == path else file.relative_to(path).parts[0]
            found.append({"file": str(file.absolute()), "label": label})
    if not found:
        raise UsageError(f"--adversarial {path}: there is no image in the folder.")
    return found


def _in_pieces(text: str) -> list[str]:
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > _PIECE and pieces[-1].strip():
            pieces.append("")
        pieces[-1] += line
    return [piece for piece in pieces if piece.strip()]


def _written(rows: list[dict[str, Any]], folder: Path) -> str:
    if not rows:
        raise UsageError("--adversarial: there is nothing in the data.")
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def texts_of(given: Any, option: str) -> list[str]:
    """A text, a list of texts, or those of a file. Raises UsageError."""
    path = Path(os.path.expanduser(given)) if isinstance(given, Path) else None
    if path is None and isinstance(given, str):
        path = named_file(given)
    if path is not None:
        return texts_of_file(path)
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise UsageError(f"{option} is a text, a list of texts or a file, not {type(given).__name__}.")
