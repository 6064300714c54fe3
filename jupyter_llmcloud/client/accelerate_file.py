"""The file that `accelerate config` writes, read where the user is: what is sent on is its content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.parallel.accelerate_config import of_option
from jupyter_llmcloud.errors import UsageError


def with_content(given: Mapping[str, Any], world_size: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Options of a run with the content of the file in place of its name; what of it has no effect, in words.

    The file also says how many ranks there are, unless the options do, or a world is there already.

    Args:
        world_size: of the world that the run finds; 0 when one is made for it.

    Raises:
        UsageError: the file cannot be read or carried out.
    """
    options = dict(given)
    if not (file := options.get("accelerate_config")):
        return options, []
    if not file.lstrip().startswith("{"):
        file = options["accelerate_config"] = _read(Path(os.path.expanduser(file)))
    translated = of_option(file)
    # On a machine without a GPU, ranks compute as the file asks for.
    told = [note for note in translated.notes if not note.startswith("use_cpu ") or _may_have_gpus()]
    notes = [f"--accelerate-config: {note}." for note in told]
    if options.get("plan") and translated.plan != options["plan"]:
        notes.append(f"--accelerate-config: --plan {options['plan']} is used, not the file's {translated.plan}.")
    if translated.num_ranks and not options.get("nproc"):
        if world_size and world_size != translated.num_ranks:
            notes.append(
                f"--accelerate-config: num_processes {translated.num_ranks} is not used: this world has {world_size} "
                f"rank{'s' * (world_size > 1)}. %world restart -n {translated.num_ranks} makes another."
            )
        else:
            options["nproc"] = translated.num_ranks
    return options, notes


def _may_have_gpus() -> bool:
    """Whether there is a driver of a GPU here; other hosts of the cluster are taken to be like this one."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--accelerate-config {path}: it cannot be read ({why}). "
            f"`accelerate config --config_file {path}` writes it."
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
