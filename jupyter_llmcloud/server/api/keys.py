"""Scoped keys: minted by somebody signed in to Jupyter, told once, revoked at once."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.serving.keys import NUM_ID_BYTES, NUM_SECRET_BYTES, ApiKey, check_scopes, make_key
from jupyter_llmcloud.protocol.http.keys import DEFAULT_EXPIRY_S, CreateKey, Key, KeyRevoked, Keys, NewKey
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation
from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

if TYPE_CHECKING:
    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests

MAX_LABEL = 200


def mint(
    state: ServerState, scopes: list[str], owner: str, expires_s: float = DEFAULT_EXPIRY_S, label: str = ""
) -> tuple[ApiKey, StoredKey]:
    """A new key: the key itself, for its holder, and what is kept of it."""
    key = make_key(secrets.token_bytes(NUM_ID_BYTES), secrets.token_bytes(NUM_SECRET_BYTES))
    now = time.time()
    stored = StoredKey(key.id, key.digest, label, check_scopes(scopes), owner, now, now + expires_s, None)
    state.add_key(stored)
    return key, stored


def told(key: StoredKey) -> Key:
    """What the API tells of a key: not even its digest."""
    return Key(
        id=key.id,
        label=key.label,
        scopes=key.scopes,
        owner=key.owner,
        created=key.created,
        expires=key.expires,
        revoked=key.revoked,
        state="revoked" if key.revoked else "valid" if key.is_valid(time.time()) else "expired",
    )


class KeysHandler(LLMCloudHandler):
    """All keys."""

    def initialize(self, state: ServerState, **shared: Any) -> None:  # type: ignore[override]
        """`state` keeps the keys."""
        super().initialize(**shared)
        self.state = state

    @operation("read", Keys)
    async def get(self) -> Keys:
        """List the keys, without their secrets."""
        return Keys(keys=[told(key) for key in self.state.list_keys()])

    @operation("execute", NewKey, 201, body=CreateKey)
    async def post(self, body: CreateKey) -> NewKey:
        """Mint a key; the answer is the only place where it is ever written."""
        key, stored = mint(self.state, body.scopes, self.actor, body.expires_s, body.label[:MAX_LABEL])
        self.audit.tell(self.actor, "key.mint", key.id, scopes=stored.scopes, expires=stored.expires)
        self.set_header("Cache-Control", "no-store")
        return NewKey(**msgspec.structs.asdict(told(stored)), key=key.text)


class KeyHandler(LLMCloudHandler):
    """One key, by its id."""

    def initialize(self, state: ServerState, requests: OpenRequests, **shared: Any) -> None:  # type: ignore[override]
        """`requests` are those that a key may have open."""
        super().initialize(**shared)
        self.state = state
        self.requests = requests

    @operation("execute", KeyRevoked)
    async def delete(self, key_id: str) -> KeyRevoked:
        """Revoke a key, also for the streams it has open."""
        await self.carry_out("key.revoke", key_id, self._revoke(key_id))
        return KeyRevoked(id=key_id)

    async def _revoke(self, key_id: str) -> None:
        self.state.revoke_key(key_id, time.time())
        self.requests.check_keys()
