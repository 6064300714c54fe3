"""Scoped keys: minted by somebody signed in to Jupyter, told once, revoked at once."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.serving.keys import NUM_ID_BYTES, NUM_SECRET_BYTES, ApiKey, check_scopes, make_key
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.server.api.base import LLMCloudHandler, access, expect
from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

if TYPE_CHECKING:
    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests

DEFAULT_EXPIRY_S = 30 * 86400.0
MAX_EXPIRY_S = 10 * 365 * 86400.0


def mint(
    state: ServerState, scopes: list[str], owner: str, expires_s: float = DEFAULT_EXPIRY_S, label: str = ""
) -> tuple[ApiKey, StoredKey]:
    """A new key: the key itself, for its holder, and what is kept of it."""
    key = make_key(secrets.token_bytes(NUM_ID_BYTES), secrets.token_bytes(NUM_SECRET_BYTES))
    now = time.time()
    stored = StoredKey(key.id, key.digest, label, check_scopes(scopes), owner, now, now + expires_s, None)
    state.add_key(stored)
    return key, stored


def told(key: StoredKey) -> dict[str, Any]:
    """What the API tells of a key: not even its digest."""
    state = "revoked" if key.revoked else "valid" if key.is_valid(time.time()) else "expired"
    kept = ("id", "label", "scopes", "owner", "created", "expires", "revoked")
    return {**{name: getattr(key, name) for name in kept}, "state": state}


class KeysHandler(LLMCloudHandler):
    """All keys."""

    def initialize(self, state: ServerState, **shared: Any) -> None:  # type: ignore[override]
        """`state` keeps the keys."""
        super().initialize(**shared)
        self.state = state

    @access("read")
    async def get(self) -> None:
        """List them."""
        self.answer({"keys": [told(key) for key in self.state.list_keys()]})

    @access("execute")
    async def post(self) -> None:
        """Mint one; the answer is the only place where it is ever written."""
        fields = self.fields("scopes", "expires_s", "label")
        scopes = [expect(str, "scopes", scope) for scope in expect(list, "scopes", fields.get("scopes", []))]
        expires_s = float(expect((int, float), "expires_s", fields.get("expires_s", DEFAULT_EXPIRY_S)))
        if not 1 <= expires_s <= MAX_EXPIRY_S:
            raise UsageError(f"expires_s {expires_s:g} is not possible: 1 second to ten years.")
        label = expect(str, "label", fields.get("label", ""))[:200]
        key, stored = mint(self.state, scopes, self.actor, expires_s, label)
        self.audit.tell(self.actor, "key.mint", key.id, scopes=stored.scopes, expires=stored.expires)
        self.set_header("Cache-Control", "no-store")
        self.answer({**told(stored), "key": key.text}, 201)


class KeyHandler(LLMCloudHandler):
    """One key, by its id."""

    def initialize(self, state: ServerState, requests: OpenRequests, **shared: Any) -> None:  # type: ignore[override]
        """`requests` are those that a key may have open."""
        super().initialize(**shared)
        self.state = state
        self.requests = requests

    @access("execute")
    async def delete(self, key_id: str) -> None:
        """Revoke it, also for the streams it has open."""
        await self.carry_out("key.revoke", key_id, self._revoke(key_id))
        self.answer({"id": key_id, "state": "revoked"})

    async def _revoke(self, key_id: str) -> None:
        self.state.revoke_key(key_id, time.time())
        self.requests.check_keys()
