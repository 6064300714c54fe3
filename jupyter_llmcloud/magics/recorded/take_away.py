"""A run as a plain script: `%runs export`, and `--export` of a cell."""

from __future__ import annotations

import os
from pathlib import Path

from jupyter_llmcloud.core.names import parse_script_file
from jupyter_llmcloud.storage.recorded import export as recorded
from jupyter_llmcloud.storage.runs import RunStore


def export(name: str, file: str) -> Path:
    """Write a run as a plain script, with what its ranks held; says how it is launched. Returns the file.

    Raises UsageError that names what cannot go along, and the way out.
    """
    path = Path(os.path.expanduser(parse_script_file(str(file))))
    script = recorded.exported(RunStore(), name, str(file))
    recorded.write(script, path)
    print(f"{path} gives the losses of {name} with any of", *(f"    {line}" for line in script.launches), sep="\n")
    for note in script.notes:
        print(note)
    return path
