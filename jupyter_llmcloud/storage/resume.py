"""A run that goes on from where an earlier one has left off: its options and its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.spec import RunSpec, as_arguments, inherited
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.checkpoints import Checkpoint, CheckpointFolder
from jupyter_llmcloud.storage.remote import run_copy
from jupyter_llmcloud.storage.runs import RunFolder, RunStore


@dataclass(frozen=True)
class Resumption:
    """What a run resumes.

    Attributes:
        spec: what was asked for, completed by what the earlier run had.
        notes: what a user is told of it.
    """

    earlier: RunFolder
    checkpoint: Checkpoint
    spec: RunSpec
    notes: list[str]

    @property
    def request(self) -> dict[str, Any]:
        """What the request that starts the run says of it."""
        point = {"folder": str(self.checkpoint.path), "step": self.checkpoint.step}
        return {"resume": point, "left_out": self.earlier.read().left_out}


def resume(store: RunStore, run: str, given: Mapping[str, Any]) -> Resumption:
    """What `--resume RUN` means beside the options that are `given`.

    Raises NotFound, and UsageError when the run has left no checkpoint that can be loaded.
    """
    folder = run_copy.find(store, run)
    found, skipped = CheckpointFolder(folder.path / "checkpoints").newest(resumable=True)
    if found is None:
        reasons = f" ({'; '.join(skipped)})" if skipped else ""
        raise UsageError(
            f"--resume {run}: {folder.run_id} has left no complete checkpoint{reasons}. "
            "Leave --resume out; with --checkpoint-every N a run saves them."
        )
    kept = {name: value for name, value in inherited(folder.read().spec).items() if given.get(name) is None}
    again = f", with {' '.join(as_arguments(RunSpec, kept))} as before" if kept else ""
    said = [f"Resuming from step {found.step} of {folder.run_id}{again}.", *skipped]
    asked = {name: value for name, value in given.items() if value is not None}
    return Resumption(folder, found, RunSpec.make({**kept, **asked}), said)
