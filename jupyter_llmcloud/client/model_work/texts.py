"""Texts for a process that works on models: read from files, and handed over in one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jupyter_llmcloud.errors import UsageError

JSON_LINES = (".jsonl", ".ndjson")


@contextmanager
def kept_texts(texts: Sequence[str] | None) -> Iterator[str]:
    """A file with texts within the block, for a process; "" when there are none."""
    if texts is None:
        yield ""
        return
    handle, path = tempfile.mkstemp(prefix="llmcloud-texts-", suffix=".json")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(list(texts), file)
        yield path
    finally:
        Path(path).unlink(missing_ok=True)


def named_file(text: str) -> Path | None:
    """The file that a text names; None where it names none, as most texts do."""
    try:
        path = Path(os.path.expanduser(text))
        return path if path.is_file() else None
    except (OSError, ValueError):  # longer than names are, or with a character that none has
        return None


def texts_of_file(path: Path) -> list[str]:
    """Texts in a file: of JSON lines the field `text` of each, else its whole content. Raises UsageError."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.") from None
    texts = _of_lines(path, content) if path.suffix in JSON_LINES else [content]
    if not any(text.strip() for text in texts):
        raise UsageError(f"{path}: there is no text in it.")
    return texts


def _of_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):  # U+2028 and its like may stand in a text of JSON
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UsageError(
                f"{path}: each line must be a JSON object with a field text that is a text, and line {number} is not."
            )
        texts.append(text)
    return texts
