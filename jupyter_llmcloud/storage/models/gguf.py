"""Models in one file, as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path

from jupyter_llmcloud.errors import ModelError


def gguf_file(path: Path) -> Path:
    """The GGUF file that `path` is, or holds. Raises ModelError."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.glob("*.gguf") if not _is_later_part(file.name))
    else:
        raise ModelError(f"{path} is neither a GGUF file nor a folder.")
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} GGUF files: name one of them, such as {files[0]}.")
    if not files:
        raise ModelError(f"{path} holds no *.gguf file: --engine llama.cpp serves GGUF. Other folders: --engine auto.")
    with files[0].open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{files[0]} is no GGUF file.")
    return files[0]


def _is_later_part(name: str) -> bool:
    """Of a model in several files the first is named: name-00001-of-00003.gguf."""
    parts = name.removesuffix(".gguf").rsplit("-", 3)
    return len(parts) == 4 and parts[2] == "of" and parts[1].isdigit() and int(parts[1]) > 1
