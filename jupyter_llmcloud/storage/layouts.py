"""How the charts of runs are laid out, pinned by the name of the run: the next run of that name inherits it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jupyter_llmcloud.storage.runs import nonce


class Layouts:
    """Those below a root folder, one file for each name."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "layouts"

    def find(self, name: str) -> dict[str, Any] | None:
        """The one pinned for runs of this name; None when there is none."""
        try:
            layout = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return layout if isinstance(layout, dict) else None

    def pin(self, name: str, layout: dict[str, Any]) -> None:
        """Keep a layout for runs of this name, in place of an earlier one; an empty one unpins it."""
        path = self._path(name)
        if not layout:
            path.unlink(missing_ok=True)
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{nonce()}")
        fresh.write_text(json.dumps(layout), encoding="utf-8")
        os.replace(fresh, path)

    def _path(self, name: str) -> Path:
        # A name may hold whatever a file name may not.
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
