"""Texts for a process that works on models: read from files, and handed over in one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jupyter_llmcloud.errors import UsageError


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


def texts_of_file(path: Path) -> list[str]:
    """Texts in a file: of JSON lines the field `text` of each, else its whole content. Raises UsageError."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        return [content]
    try:
        return [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: each line must be a JSON object with a field text.") from None
