"""Options of a run in a script without this package: as its settings, as a note, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.errors import UsageError

_CARRIED = {"precision", "seed", "args", "save"}
# They change nothing of what a cell computes, or say how it was started.
_OF_THE_CALL = {"nproc", "ranks", "cluster", "name", "priority", "push", "pull", "background", "no_replay", "fresh"}
_OF_THE_CALL |= {"timeout", "hang_after", "watch", "track", "export"}
_SUPERVISION = {"balance", "checkpoint_every", "keep_checkpoints", "max_restarts"}


def check_options(spec: Mapping[str, Any]) -> list[str]:
    """Notes on options that do not go along; raises UsageError for one without which the losses would be others."""
    plan = str(spec.get("plan") or "ddp")
    if plan != "ddp":
        raise UsageError(
            f"--plan {plan} cannot be exported: a plain Accelerate script has no counterpart that trains the same on "
            "every machine. Run the cell with --plan ddp and export that run."
        )
    if spec.get("resume"):
        raise UsageError(
            f"--resume {spec['resume']}: this run began at a checkpoint. Export the run that it goes on from, or run "
            "the cell from its start."
        )
    known = _CARRIED | _OF_THE_CALL | _SUPERVISION | {"plan", "resume"}
    for name, value in spec.items():
        if name not in known and value not in (None, False, "no"):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} cannot be exported: a plain script has no counterpart of it. Run the cell without it and "
                "export that run."
            )
    left = sorted("--" + name.replace("_", "-") for name in spec if name in _SUPERVISION)
    return [f"{', '.join(left)}: a script saves no checkpoints and is not restarted by itself."] if left else []
