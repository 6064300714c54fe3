"""A RunSpec as the message by which an agent is asked to execute it."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.core.messages import Execute
from jupyter_llmcloud.core.spec import RunSpec


def execute(spec: RunSpec, **about: Any) -> Execute:
    """The request; `about` says what RunSpec does not: which run, which source, on which ranks of which world."""
    return Execute(
        spec=spec.as_dict(),
        precision=spec.precision or "",
        save=spec.save or [],
        pull=spec.pull or [],
        background=spec.background,
        timeout_s=spec.timeout or 0.0,
        hang_after_s=spec.hang_after,
        seed=spec.seed,
        checkpoint_every=spec.checkpoint_every,
        keep_checkpoints=spec.keep_checkpoints,
        max_restarts=spec.max_restarts,
        **about,
    )
