"""Scoped keys: minted and rotated by somebody signed in to Jupyter, told once, revoked at once; and their usage."""

from __future__ import annotations

import dataclasses
import inspect
import os
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.serving.keys import NUM_ID_BYTES, NUM_SECRET_BYTES, ApiKey, check_scopes, make_key
from jupyter_llmcloud.core.serving.usage.quota import KeyLimits
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.http.keys import (
    DEFAULT_EXPIRY_S,
    CreateKey,
    Key,
    KeyAlert,
    KeyAlerts,
    KeyAlertsQuery,
    KeyRevoked,
    Keys,
    KeysUsage,
    KeyUsage,
    KeyUsageQuery,
    NewKey,
    RotateKey,
)
from jupyter_llmcloud.server.api.base import RESOURCE, LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation
from jupyter_llmcloud.server.gateway.key_alerts import ALERT
from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

if TYPE_CHECKING:
    from jupyter_server.base.handlers import JupyterHandler

    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests

ADMIN = "admin"  # the action that Jupyter's authorizer is asked about, on llmcloud
MAX_LABEL = 200
MAX_ALERTS = 10_000  # that are looked through
NO_LIMITS = KeyLimits()


def _make(**values: Any) -> tuple[ApiKey, StoredKey]:
    key = make_key(secrets.token_bytes(NUM_ID_BYTES), secrets.token_bytes(NUM_SECRET_BYTES))
    return key, StoredKey(id=key.id, digest=key.digest, revoked=None, **values)


def mint(
    state: ServerState,
    scopes: list[str],
    owner: str,
    expires_s: float = DEFAULT_EXPIRY_S,
    label: str = "",
    limits: KeyLimits = NO_LIMITS,
) -> tuple[ApiKey, StoredKey]:
    """A new key: the key itself, for its holder, and what is kept of it."""
    now = time.time()
    key, stored = _make(
        label=label, scopes=check_scopes(scopes), owner=owner, created=now, expires=now + expires_s,
        **dataclasses.asdict(limits),
    )  # fmt: skip
    state.add_key(stored)
    return key, stored


def rotate(state: ServerState, old: StoredKey, overlap_s: float) -> tuple[ApiKey, StoredKey]:
    """A new key in place of one that is valid: the same scopes, owner, limits and length of life, from now on."""
    now = time.time()
    if not old.is_valid(now):
        raise NotFound(f"key {old.id!r} is not valid any more, and cannot be rotated: create a new one.")
    expires = None if old.expires is None else now + (old.expires - old.created)
    key, stored = _make(
        label=old.label, scopes=old.scopes, owner=old.owner, created=now, expires=expires,
        **dataclasses.asdict(old.limits),
    )  # fmt: skip
    state.replace_key(old.id, stored, now + overlap_s)
    return key, stored


def told(key: StoredKey, last_used: float | None = None) -> Key:
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
        replaced_by=key.replaced_by,
        last_used=last_used,
        **dataclasses.asdict(key.limits),
    )


async def has_all_keys(handler: JupyterHandler) -> bool:
    """Whether whoever asks may do with all keys what they may do with their own.

    Jupyter's authorizer decides (the default one allows all to who is signed in). Behind JupyterHub others than the
    server's user may be let in, when the server is shared with them or their group: of these, only administrators of
    the Hub see what others have minted.
    """
    user: Any = handler.current_user
    about = getattr(user, "hub_user", None)
    if isinstance(about, dict) and not about.get("admin") and user.username != os.environ.get("JUPYTERHUB_USER"):
        return False
    allowed = handler.authorizer.is_authorized(handler, user, ADMIN, RESOURCE)
    return bool(await allowed if inspect.isawaitable(allowed) else allowed)


async def owner_seen(handler: JupyterHandler) -> str | None:
    """Whose keys alone whoever asks may know of; None: everybody's."""
    if await has_all_keys(handler):
        return None
    return getattr(handler.current_user, "username", None) or "unknown"


class _KeyHandler(LLMCloudHandler):
    """What the routes of keys share."""

    def initialize(self, state: ServerState, **shared: Any) -> None:  # type: ignore[override]
        """`state` keeps the keys."""
        super().initialize(**shared)
        self.state = state

    async def own_keys(self) -> dict[str, StoredKey]:
        """The keys that whoever asks may know of, by their ids; the newest first."""
        owner = await owner_seen(self)
        return {key.id: key for key in self.state.list_keys() if owner in (None, key.owner)}

    async def own_key(self, key_id: str) -> StoredKey:
        """One of them; raises NotFound, also for a key of somebody else."""
        key = (await self.own_keys()).get(key_id)
        if key is None:
            raise NotFound(f"there is no key {key_id!r}: %endpoints keys list shows their ids.")
        return key

    def hand_out(self, key: ApiKey, stored: StoredKey) -> NewKey:
        """The only answer in which a key is ever written; nothing on the way may keep it."""
        self.set_header("Cache-Control", "no-store")
        return NewKey(**msgspec.structs.asdict(told(stored)), key=key.text)


class KeysHandler(_KeyHandler):
    """All keys."""

    @operation("read", Keys)
    async def get(self) -> Keys:
        """List the keys, without their secrets: one's own, and those of others for who may see them."""
        last_used = self.state.last_used()
        return Keys(keys=[told(key, last_used.get(key.id)) for key in (await self.own_keys()).values()])

    @operation("execute", NewKey, 201, body=CreateKey)
    async def post(self, body: CreateKey) -> NewKey:
        """Mint a key; the answer is the only place where it is ever written."""
        limits = KeyLimits(body.requests_per_minute, body.tokens_per_minute, body.parallel_requests)
        key, stored = mint(self.state, body.scopes, self.actor, body.expires_s, body.label[:MAX_LABEL], limits)
        self.audit.tell(
            self.actor, "key.mint", key.id, scopes=stored.scopes, expires=stored.expires, **dataclasses.asdict(limits)
        )
        return self.hand_out(key, stored)


class KeyHandler(_KeyHandler):
    """One key, by its id."""

    def initialize(self, requests: OpenRequests, **shared: Any) -> None:  # type: ignore[override]
        """`requests` are those that a key may have open."""
        super().initialize(**shared)
        self.requests = requests

    @operation("execute", KeyRevoked)
    async def delete(self, key_id: str) -> KeyRevoked:
        """Revoke a key, also for the streams it has open."""
        await self.carry_out("key.revoke", key_id, self._revoke(key_id))
        return KeyRevoked(id=key_id)

    async def _revoke(self, key_id: str) -> None:
        key = await self.own_key(key_id)
        self.state.revoke_key(key.id, time.time())
        self.requests.check_keys()


class KeyRotationHandler(_KeyHandler):
    """A key in place of another one."""

    @operation("execute", NewKey, 201, body=RotateKey)
    async def post(self, key_id: str, body: RotateKey) -> NewKey:
        """Mint a key in place of one, which stays valid for a while.

        Whoever mints and revokes keys may do so; a key never does, not even for itself.
        """
        key, stored = await self.carry_out(
            "key.rotate", key_id, self._rotate(key_id, body.overlap_s), overlap_s=body.overlap_s
        )
        return self.hand_out(key, stored)

    async def _rotate(self, key_id: str, overlap_s: float) -> tuple[ApiKey, StoredKey]:
        return rotate(self.state, await self.own_key(key_id), overlap_s)


class KeyUsageHandler(_KeyHandler):
    """What was asked with keys."""

    def initialize(self, requests: OpenRequests, **shared: Any) -> None:  # type: ignore[override]
        """`requests` writes them down now and then."""
        super().initialize(**shared)
        self.requests = requests

    @operation("read", KeysUsage, query=KeyUsageQuery)
    async def get(self, query: KeyUsageQuery) -> KeysUsage:
        """Requests and tokens of each key by day; of revoked and expired keys too."""
        since = datetime.now(UTC).date() - timedelta(days=query.days - 1)
        await self.requests.write()  # what has ended just now, too
        keys = await self.own_keys()
        return KeysUsage(
            usage=[
                KeyUsage(
                    id=row.key_id, label=keys[row.key_id].label, owner=keys[row.key_id].owner, day=row.day,
                    requests=row.requests, refused=row.refused, prompt_tokens=row.prompt_tokens,
                    generated_tokens=row.completion_tokens, last_used=row.last_used,
                )
                for row in self.state.key_usage(since.isoformat())
                if row.key_id in keys
            ]
        )  # fmt: skip


class KeyAlertsHandler(_KeyHandler):
    """What was unusual."""

    @operation("read", KeyAlerts, query=KeyAlertsQuery)
    async def get(self, query: KeyAlertsQuery) -> KeyAlerts:
        """Unusual uses of keys: from a new address, ten times as much as before, only refusals."""
        keys = await self.own_keys()
        # Those of others are left out first: they must not take the place of one's own.
        limit = query.limit if await owner_seen(self) is None else MAX_ALERTS
        rows = [row for row in self.state.audit(limit, action=ALERT) if row["subject"] in keys][: query.limit]
        return KeyAlerts(
            alerts=[
                KeyAlert(id=row["subject"], t=row["t"], rule=row["detail"]["rule"], what=row["detail"]["what"])
                for row in rows
            ]
        )
