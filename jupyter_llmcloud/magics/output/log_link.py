"""All that a run has written, as a file, and a link to it for the browser that shows this notebook."""

from __future__ import annotations

import contextlib
import os
from html import escape
from typing import Any
from urllib.parse import quote, urlsplit

from jupyter_llmcloud import config
from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.runs import RunFolder, RunStore
from jupyter_llmcloud.system.gil import short_switch_intervals


class FullLog:
    """What a cell has no room for; written when it is asked for."""

    def __init__(self, run_id: str, name: str) -> None:
        self._run_id = run_id
        self._name = name
        self._is_written = False

    def where(self) -> str:
        """How to read it, in the words of a cell."""
        return f"%runs logs {self._name} · {shown(str(log_text.path(self._folder)))}"

    def link(self) -> dict[str, Any]:
        """See `log_link`; the file is there from now on."""
        if not self._is_written:
            self.write()
        return log_link(self._run_id, self._name)

    def write(self) -> None:
        """Bring the file up to date."""
        self._is_written = True
        with short_switch_intervals(), contextlib.suppress(OSError):  # the run has been deleted, or the disk is full
            log_text.write(self._folder)

    @property
    def _folder(self) -> RunFolder:
        return RunStore().folder(self._run_id)


def log_url(run_id: str) -> str:
    """Where the Jupyter server of this notebook shows the log, without a token; "" when no such server has the run."""
    server = discovery.parent_server()
    if server is None:
        return ""
    try:
        root = str(server.status()["root"])
    except LLMCloudError:
        return ""
    finally:
        server.close()
    if os.path.realpath(root) != os.path.realpath(config.root()):
        return ""  # it would look among other runs
    return f"{server.url}llmcloud/api/runs/{quote(run_id, safe='')}/log"


def log_link(run_id: str, name: str) -> dict[str, Any]:
    """A mime bundle that links to the log; empty when no browser could read it.

    The link has no host: the browser may know the server by another name than the kernel does.
    """
    url = log_url(run_id)
    if not url:
        return {}
    path = urlsplit(url).path
    link = f'<a href="{escape(path)}" target="_blank" rel="noopener">Open the full log of {escape(name)}</a>'
    return {"text/html": f"<p>{link}</p>", "text/plain": f"The full log of {name}: {url}"}
