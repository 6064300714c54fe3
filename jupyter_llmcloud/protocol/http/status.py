"""What a server says of itself."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.http.base import Response


class Status(Response, frozen=True):
    """What this server is."""

    version: Annotated[str, Meta(description="Of jupyter-llmcloud, as installed on the server.")]
    pid: Annotated[int, Meta(description="Of the server's process.")]
    headless: Annotated[bool, Meta(description="Whether it was started by a kernel or a terminal, and goes with it.")]
    root: Annotated[str, Meta(description="The folder in which it keeps runs, on its own host.")]


class Live(Response, frozen=True):
    """The server answers."""

    status: Literal["ok"] = "ok"


class Ready(Response, frozen=True):
    """The endpoints that were saved are known again."""

    status: Literal["ready"] = "ready"
