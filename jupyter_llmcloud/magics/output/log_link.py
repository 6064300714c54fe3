"""A link to all that a run has written, for the browser that shows this notebook."""

from __future__ import annotations

import os
from html import escape
from typing import Any
from urllib.parse import quote, urlsplit

from jupyter_llmcloud import config
from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.errors import LLMCloudError


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
