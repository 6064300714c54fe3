"""What is said of a target that is neither a run nor a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.server.endpoints.model_folder import resolve_target
from jupyter_llmcloud.storage.runs import RunStore


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("/no/model", "there is no folder '/no/model'."),
        ("models/best", "there is no folder 'models/best': a folder is best named by its whole path."),
        (
            "best",
            "there is no run 'best'. There are no runs yet. "
            "Nor is there a folder 'best': a folder is best named by its whole path.",
        ),
    ],
    ids=["whole path", "path", "name"],
)
def test_what_is_missing_is_told_once(tmp_path: Path, target: str, told: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve_target(target, RunStore(tmp_path), tmp_path)
    assert str(caught.value) == told
