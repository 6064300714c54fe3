"""Whose keys somebody sees, revokes and rotates: their own, and those of all who use this server for who may."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_server.base.handlers import JupyterHandler

ADMIN = "admin"  # the action that Jupyter's authorizer is asked about, on llmcloud


async def has_all_keys(handler: JupyterHandler, resource: str) -> bool:
    """Whether whoever asks may do with all keys what they may do with their own.

    Jupyter's authorizer decides (the default one allows all to who is signed in). Behind JupyterHub others than the
    server's user may be let in, when the server is shared with them or their group: of these, only administrators of
    the Hub see what others have minted.
    """
    user: Any = handler.current_user
    about = getattr(user, "hub_user", None)
    if isinstance(about, dict) and not about.get("admin") and user.username != os.environ.get("JUPYTERHUB_USER"):
        return False
    allowed = handler.authorizer.is_authorized(handler, user, ADMIN, resource)
    return bool(await allowed if inspect.isawaitable(allowed) else allowed)
