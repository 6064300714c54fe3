"""The trackers that `--track` names, and the package that each needs where a run is executed."""

from __future__ import annotations

from jupyter_llmcloud.errors import UsageError

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def parse_trackers(text: str) -> list[str]:
    """`tensorboard,wandb`. Raises UsageError that says what there is."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UsageError(f"there is no tracker {unknown[0]!r}. Known: {', '.join(TRACKERS)}")
    return list(dict.fromkeys(names))
