"""What an output holds so that a page can show the panel of something by asking the server for it.

JupyterLab and Notebook 7 have our renderer for it: the panel is there again after a reload of the page, in a second
browser, after a restart of the kernel. Front ends without it take another form of the same output.
"""

from __future__ import annotations

from typing import Any, Literal

PANEL_MIME = "application/vnd.jupyter-llmcloud.panel+json"

Kind = Literal["run", "cluster", "world", "endpoint"]


def panel(kind: Kind, ident: str, name: str) -> dict[str, Any]:
    """The part of a mime bundle that names what is shown."""
    return {PANEL_MIME: {"kind": kind, "id": ident, "name": name, "version": 1}}
