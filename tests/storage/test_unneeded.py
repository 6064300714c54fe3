"""Folders of code and models that are served no more."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.storage.models.unneeded import remove_unneeded
from jupyter_llmcloud.storage.server_state import ServerState, StoredEndpoint

DAY = 86400.0


def _made(root: Path, name: str, age_s: float = DAY) -> Path:
    folder = root / "endpoints" / name
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text("{}")
    then = time.time() - age_s
    os.utime(folder, (then, then))
    return folder


def test_what_no_revision_of_any_server_needs_goes_and_all_else_stays(tmp_path: Path) -> None:
    served, earlier, adapter = (_made(tmp_path, letter * 16) for letter in "abc")
    model, gone_model = _made(tmp_path, "models/net-1"), _made(tmp_path, "models/net-2")
    gone, fresh, foreign = _made(tmp_path, "d" * 16), _made(tmp_path, "e" * 16, age_s=60), _made(tmp_path, "notes")
    (tmp_path / "endpoints" / ("f" * 16)).symlink_to(foreign)
    state = ServerState(tmp_path / "server.sqlite")
    mine = [Revision(1, str(earlier), source=str(earlier / "cell.json"), role="retired"), Revision(2, str(served))]
    state.save_endpoint("one", StoredEndpoint("mine", mine, adapters={"a": str(adapter)}))
    state.save_endpoint("two", StoredEndpoint("theirs", [Revision(1, str(model)), Revision(2, "/elsewhere")]))
    assert set(remove_unneeded(state.served_paths(), tmp_path)) == {gone, gone_model}
    state.close()
    assert not gone.exists() and not gone_model.exists()
    assert all(folder.is_dir() for folder in (served, earlier, adapter, model, fresh, foreign))


def test_there_may_be_none(tmp_path: Path) -> None:
    assert remove_unneeded([], tmp_path) == []
