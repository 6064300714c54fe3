"""The file that `accelerate config` writes, read where the user is: what is sent on is its content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.parallel.accelerate_config import of_option
from jupyter_llmcloud.errors import UsageError


def with_content(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of a run with the content of the file in place of its name; what of it has no effect, in words.

    The file also says how many ranks there are, unless the options do. Raises UsageError when the file cannot be read
    or carried out.
    """
    options = dict(given)
    if not (file := options.get("accelerate_config")):
        return options, []
    if not file.lstrip().startswith("{"):
        file = options["accelerate_config"] = _read(Path(file).expanduser())
    translated = of_option(file)
    notes = [f"--accelerate-config: {note}." for note in translated.notes]
    if options.get("plan") and translated.plan != options["plan"]:
        notes.append(f"--accelerate-config: --plan {options['plan']} is used, not the file's {translated.plan}.")
    if translated.num_ranks and not options.get("nproc"):
        options["nproc"] = translated.num_ranks
    return options, notes


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--accelerate-config {path}: it cannot be read ({error}). `accelerate config --config_file {path}` writes "
            "it."
        ) from None
    try:
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise UsageError(f"--accelerate-config {path}: it is no YAML or JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--accelerate-config {path}: it has no fields. `accelerate config` writes some.")
    return json.dumps(content, sort_keys=True)


def _yaml(text: str) -> object:
    try:
        import yaml
    except ImportError:
        raise UsageError(
            "--accelerate-config: reading YAML needs the package pyyaml here, or give the file as .json."
        ) from None
    try:
        found: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return found
