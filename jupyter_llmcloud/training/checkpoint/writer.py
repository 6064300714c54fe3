"""The files of a checkpoint: what a rank writes of one, and what is read when the run goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.storage.checkpoints import seal
from jupyter_llmcloud.training.checkpoint import state_files, stateful_objects
from jupyter_llmcloud.training.checkpoint.serialization import load, save

_NICE = 10  # the training goes first


@dataclass
class Write:
    """What a rank writes of one checkpoint."""

    part: CheckpointPart
    name: str
    staging: Callable[[], Path]
    shared: dict[str, Any] | None
    own: dict[str, Any]
    bad_loss: str
    finish_copies: Callable[[], None]
    changed: Callable[[], list[str]]  # what was compared meanwhile, and is not what the checkpoint takes it for
    is_waited_for: bool = False  # nothing is trained until it is written

    def parts(self) -> CheckpointPart:
        """Copy what is left, check, write, make durable; returns what to tell the agent."""
        self.finish_copies()
        if not self.is_waited_for:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        states = {**(self.shared or {}), **self.own["objects"]}
        if reason := stateful_objects.not_finite(states) or (self.bad_loss and f"{self.bad_loss} is not finite"):
            return replace(self.part, not_finite=reason)
        if changed := self.changed():
            raise RuntimeError(
                f"{_named(changed[0])} is large and has changed for the first time; the next one holds it"
            )
        staging = self.staging()
        names = [self.name]
        if self.shared is not None:
            names += _write_shared(self.shared, staging)
        own, files = state_files.write(self.own, staging / self.name)
        save(own, staging / self.name)
        names += files
        return replace(self.part, files={name: seal(staging / name) for name in names})


def _named(address: str) -> str:
    return repr(address.partition(" ")[2].removesuffix("<memory>") or address)


def _write_shared(shared: dict[str, Any], staging: Path) -> list[str]:
    """Models as safetensors, which other programs read too; the rest beside them."""
    names, rest = ["shared.pt"], {}
    for address, state in shared.items():
        if state["kind"] != "module":
            rest[address] = state
            continue
        tensors = {name: value for name, value in state["state"].items() if isinstance(value, torch.Tensor)}
        name = "model.safetensors" if len(names) == 1 else f"model-{len(names)}.safetensors"
        save_file(tensors, str(staging / name))
        others = {key: value for key, value in state["state"].items() if key not in tensors}
        rest[address] = {**state, "state": others, "file": name}
        names.append(name)
    save(rest, staging / "shared.pt")
    return names


def with_tensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The saved state of an object, with those of its tensors that are in a file of their own."""
    if "file" not in state:
        return state
    return {**state, "state": {**state["state"], **load_file(str(folder / state["file"]))}}


def read(path: Path) -> dict[str, Any]:
    """Only data is read: `weights_only` runs no code of a file. The agent has verified it by its manifest."""
    return state_files.put_back(load(path), path.parent)
